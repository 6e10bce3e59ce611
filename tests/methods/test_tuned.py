"""Compensated weights: the textbook's ridge regression in FP64, a fit that falls, and other tokens that choose."""

import pytest
import torch
from method_problems import problem
from torch import Tensor

from fourge.methods import tuned
from fourge.methods.tuned import MOST_MOVED, STRENGTHS, CrossMoment, Judge, compensate
from fourge.nvfp4.quantize import amax, fake_quantize, global_scale


def rounded(x: Tensor) -> Tensor:
    return fake_quantize(x, global_scale(2 * amax(x)))


def fitted(x: Tensor, q: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> CrossMoment:
    """Of x − q, or with `weight` of the output's shortfall."""
    shortfall = x - q
    if weight is not None:
        shortfall = shortfall @ weight.T
    if residual is not None:
        shortfall = shortfall + residual
    cross = CrossMoment(shortfall.shape[1], q.shape[1])
    for part in zip(shortfall.split(100), q.split(100), strict=True):
        cross.add(*part)
    return cross


def textbook(weight: Tensor, x: Tensor, q: Tensor, residual: Tensor, strength: float) -> Tensor:
    """min ‖x Wᵀ + r − q W*ᵀ‖² + λ‖W* − W‖² as one least-squares problem in FP64, the penalty as rows of its own."""
    w, x64, q64 = weight.double(), x.double(), q.double()
    root = (strength * (q64.T @ q64).diagonal().mean()).sqrt()
    left = torch.cat((q64, root * torch.eye(q.shape[1], dtype=torch.float64)))
    right = torch.cat((x64 @ w.T + residual.double(), root * w.T))
    return torch.linalg.lstsq(left, right).solution.T


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may move as far as they like."""
    monkeypatch.setattr(tuned, "MOST_MOVED", float("inf"))


@pytest.mark.usefixtures("no_limit")
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_textbook_s_ridge_regression(seed: int) -> None:
    weight, x = problem(seed)
    q = rounded(x)
    generator = torch.Generator().manual_seed(seed)
    residual = 0.002 * q @ torch.randn(q.shape[1], len(weight), generator=generator)
    found = compensate(
        {"w": weight}, q.T @ q, fitted(x, q, weight, residual), Judge((x - q) @ weight.T + residual, q), whole=True
    )
    assert found.strength == min(STRENGTHS), "judged by the tokens that it was fitted to, the weakest penalty is best"
    expected = textbook(weight, x, q, residual, found.strength)
    assert torch.allclose(found.weights["w"].double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@pytest.mark.usefixtures("no_limit")
@pytest.mark.parametrize("seed", range(20))
def test_the_objective_falls(seed: int) -> None:
    """On the tokens that are fitted, for Linears in a group and for one alone."""
    weight, x = problem(seed, tokens=1024)
    q = rounded(x)
    judge = Judge(x - q, q)
    halves = {"a": weight[:12], "b": weight[12:]}
    found = compensate(halves, q.T @ q, fitted(x, q), judge, whole=False)
    assert found.strength is not None and found.error < 1
    target = x.double() @ weight.double().T
    moved = torch.cat((found.weights["a"], found.weights["b"]))
    before, after = ((target - q.double() @ w.double().T).norm() for w in (weight, moved))
    assert after < before
    alone = compensate({"w": weight}, q.T @ q, fitted(x, q, weight), Judge((x - q) @ weight.T, q), whole=True)
    assert alone.strength == found.strength
    assert torch.allclose(alone.weights["w"], moved, rtol=1e-3, atol=1e-5)


def test_a_weight_counts_tokens_as_so_many() -> None:
    s, q = torch.randn(5, 24), torch.randn(5, 32)
    cross = CrossMoment(24, 32)
    cross.add(s, q)
    cross.add(s, q, 3.0)
    torch.testing.assert_close(cross.sum, 4 * s.T @ q)


def test_the_reported_error_is_that_of_the_judge_s_tokens() -> None:
    weight, x = problem(5, tokens=1024)
    q = rounded(x)
    found = compensate(
        {"w": weight}, q[:512].T @ q[:512], fitted(x[:512], q[:512]), Judge(x[512:] - q[512:], q[512:]), whole=False
    )
    target = x[512:].double() @ weight.double().T
    before, after = ((target - q[512:].double() @ w.double().T).norm() for w in (weight, found.weights["w"]))
    assert found.error == pytest.approx((after / before).item(), rel=1e-3)


@pytest.mark.parametrize("whole", [False, True])
def test_of_all_strengths_the_best_that_moves_no_weight_too_far_wins(whole: bool) -> None:
    """Each as the textbook has it, on tokens that were not fitted: few were, so the weakest penalty is not the best."""
    weight, x = problem(1, tokens=1152)
    q = rounded(x)
    fit, others = slice(0, 40), slice(128, 1152)
    judge = Judge((x[others] - q[others]) @ weight.T if whole else x[others] - q[others], q[others])
    cross = fitted(x[fit], q[fit], weight if whole else None)
    found = compensate({"w": weight}, q[fit].T @ q[fit], cross, judge, whole=whole)
    target = x[others].double() @ weight.double().T
    errors = {}
    for strength in STRENGTHS:
        moved = textbook(weight, x[fit], q[fit], torch.zeros(1), strength)
        if (moved - weight).norm() <= MOST_MOVED * weight.norm():
            errors[strength] = (target - q[others].double() @ moved.T).norm().item()
    assert 1 < len(errors) < len(STRENGTHS), "neither the limit nor the choice would be tried"
    assert found.strength == min(errors, key=errors.__getitem__) != min(errors)
    before = (target - q[others].double() @ weight.double().T).norm().item()
    assert found.error == pytest.approx(min(errors.values()) / before, rel=1e-3)


def test_other_tokens_that_gain_nothing_keep_the_weights() -> None:
    """What was fitted points the wrong way there: W itself stays, to the bit."""
    weight, x = problem(1)
    q = rounded(x)
    found = compensate({"w": weight}, q.T @ q, fitted(x, q), Judge(q - x, q), whole=False)
    assert (found.strength, found.error) == (None, 1.0)
    assert torch.equal(found.weights["w"], weight)


@pytest.mark.parametrize("where", ["cross", "judge"])
def test_what_is_no_number_is_no_gain(where: str) -> None:
    weight, x = problem(1)
    q = rounded(x)
    cross, judge = fitted(x, q), Judge(x - q, q.clone())
    (cross.sum if where == "cross" else judge.inputs)[3, 3] = torch.nan
    found = compensate({"w": weight}, q.T @ q, cross, judge, whole=False)
    assert (found.strength, found.error) == (None, 1.0)
    assert torch.equal(found.weights["w"], weight)


def test_inputs_that_are_always_zero_move_nothing() -> None:
    weight, _ = problem(2)
    nothing = torch.zeros(64, weight.shape[1])
    found = compensate(
        {"w": weight}, nothing.T @ nothing, fitted(nothing, nothing), Judge(nothing, nothing), whole=False
    )
    assert found.strength is None
    assert torch.equal(found.weights["w"], weight)
    dead = torch.zeros_like(weight)
    assert (
        compensate(
            {"w": dead}, weight.T @ weight, fitted(weight, 0 * weight), Judge(weight, weight), whole=False
        ).strength
        is None
    )
