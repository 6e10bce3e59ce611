"""The accumulator against FP64 products; the factor against its definition and against GPTQ's own U."""

from typing import Any

import pytest
import torch
from method_problems import left_to_right
from textbook_twins import dampened, upper_of_inverse

from fourge.methods.hessian import HessianAccumulator, by_activity, factorize


def random_hessian(columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.linspace(0.1, 3, columns)
    return (x.T @ x).triu() + (x.T @ x).triu(1).T


@pytest.mark.parametrize("columns", [32, 1040])  # 1040: more than one block of columns
def test_sums_match_fp64(columns: int) -> None:
    accumulator = HessianAccumulator(columns)
    micro_batches = [torch.randn(2, 9, columns).bfloat16(), torch.randn(5, columns).bfloat16(), torch.randn(columns)]
    for x in micro_batches:
        accumulator.add(x)
    everything = torch.cat([x.reshape(-1, columns).double() for x in micro_batches])
    expected = everything.T @ everything
    assert accumulator.tokens == 24
    torch.testing.assert_close(accumulator.matrix.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(accumulator.diagonal.double(), expected.diagonal(), rtol=1e-5, atol=1e-4)


def test_a_weight_counts_tokens_as_so_many() -> None:
    x, once = torch.randn(5, 1040), torch.randn(7, 1040)
    weighted, repeated = HessianAccumulator(1040), HessianAccumulator(1040)
    for accumulator in (weighted, repeated):
        accumulator.add(once)
    weighted.add(x, weight=3.0)
    for _ in range(3):
        repeated.add(x)
    assert (weighted.tokens, repeated.tokens) == (12, 22)
    torch.testing.assert_close(weighted.matrix, repeated.matrix, rtol=1e-5, atol=1e-4)


def test_reading_the_matrix_does_not_disturb_the_sum() -> None:
    x = torch.randn(30, 1040, dtype=torch.float64)
    read, unread = (HessianAccumulator(1040, dtype=torch.float64) for _ in range(2))
    for part in x.split(10):
        read.add(part)
        unread.add(part)
        assert read.matrix.equal(read.matrix.T)
    assert read.matrix.equal(unread.matrix)


def test_fp64_keeps_what_fp32_loses() -> None:
    x = torch.full((1, 16), 1e-4, dtype=torch.float64)
    x[0, 0] = 1.0
    accumulator = HessianAccumulator(16, dtype=torch.float64)
    for _ in range(3):
        accumulator.add(x)
    assert accumulator.diagonal.tolist() == pytest.approx([3.0] + [3e-8] * 15, rel=1e-14)


@pytest.mark.parametrize("order_of", [left_to_right, by_activity])
def test_factor_multiplies_back(order_of: Any) -> None:
    hessian = random_hessian(64, 200)
    order = order_of(hessian.diagonal())
    events: list[dict[str, Any]] = []
    curvature = factorize(hessian.clone(), order, events, "linear")
    f = curvature.feedback
    assert f.equal(f.triu())
    torch.testing.assert_close(f.diagonal(), torch.ones(64, dtype=torch.float64))
    expected = dampened(hessian, 0.05)[order][:, order]
    torch.testing.assert_close(f * curvature.cost @ f.T, expected)
    assert events == []


def test_factor_is_the_inverse_of_gptqs() -> None:
    hessian = random_hessian(48, 100)
    curvature = factorize(hessian.clone(), left_to_right(hessian.diagonal()), [], "linear")
    upper = upper_of_inverse(dampened(hessian, 0.05))
    torch.testing.assert_close(torch.linalg.inv(curvature.feedback * curvature.cost.sqrt()), upper)


def test_activity_order_keeps_groups_together_and_falls() -> None:
    diagonal = torch.rand(160, generator=torch.Generator().manual_seed(3))
    order = by_activity(diagonal)
    assert order.sort().values.tolist() == list(range(160))
    groups = order.view(-1, 16) // 16
    assert (groups == groups[:, :1]).all()
    sums = diagonal[order].view(-1, 16).sum(1)
    assert (sums.diff() <= 0).all()
    assert (diagonal[order].view(-1, 16).diff(dim=1) <= 0).all()


def test_failed_cholesky_raises_the_dampening_and_says_so() -> None:
    # Eigenvalues 3 and −1, mean diagonal 1: .05 and .5 are too little, 5 is enough.
    hessian = torch.kron(torch.eye(8), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    events: list[dict[str, Any]] = []
    curvature = factorize(hessian.clone(), left_to_right(hessian.diagonal()), events, "layers.3.down_proj")
    assert events == [
        {"event": "dampening raised", "linear": "layers.3.down_proj", "from": 0.05, "to": 0.5},
        {"event": "dampening raised", "linear": "layers.3.down_proj", "from": 0.5, "to": 5.0},
    ]
    f = curvature.feedback
    torch.testing.assert_close(f * curvature.cost @ f.T, dampened(hessian, 5.0).float())


def test_dampening_raised_is_a_fresh_start_with_more_of_it() -> None:
    """At a size that takes several panels: what the failed attempt left behind is undone."""
    columns = 1040
    hessian = random_hessian(columns, 2 * columns)
    hessian -= 0.2 * hessian.diagonal().mean() * torch.eye(columns)
    order = by_activity(hessian.diagonal())
    events: list[dict[str, Any]] = []
    retried = factorize(hessian.clone(), order, events, "linear", dampening=0.03)
    assert [event["to"] for event in events] == [0.3]
    direct = factorize(hessian.clone(), order, [], "linear", dampening=0.3)
    assert retried.feedback.equal(direct.feedback) and retried.cost.equal(direct.cost)


def test_the_factor_takes_the_hessians_memory() -> None:
    for hessian in (random_hessian(64, 200), torch.zeros(64, 64)):
        memory = hessian.data_ptr()
        assert factorize(hessian, by_activity(hessian.diagonal()), [], "linear").feedback.data_ptr() == memory


def test_rank_deficient_hessian_in_fp32() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x
    events: list[dict[str, Any]] = []
    curvature = factorize(hessian, by_activity(hessian.diagonal()), events, "linear", dampening=1e-12)
    assert curvature.feedback.isfinite().all() and (curvature.cost > 0).all()
    assert events and {event["event"] for event in events} == {"dampening raised"}


def test_never_active_channels_are_counted_and_left_alone() -> None:
    x = torch.randn(100, 32)
    x[:, [3, 20]] = 0
    events: list[dict[str, Any]] = []
    curvature = factorize(x.T @ x, torch.arange(32), events, "linear")
    assert events == [{"event": "input channels never active", "linear": "linear", "channels": 2}]
    alone = torch.eye(32)[[3, 20]]
    assert curvature.feedback[[3, 20]].equal(alone) and curvature.feedback[:, [3, 20]].T.equal(alone)


def test_zero_inputs_are_recorded() -> None:
    events: list[dict[str, Any]] = []
    curvature = factorize(torch.zeros(16, 16), torch.arange(16), events, "linear")
    assert events == [{"event": "inputs are all zero", "linear": "linear"}]
    assert curvature.feedback.equal(torch.eye(16)) and curvature.cost.equal(torch.ones(16))


@pytest.mark.gpu
def test_gpu_gives_the_cpus_factor() -> None:
    x = torch.randn(200, 1040, dtype=torch.float64)
    factors = []
    for device in ("cpu", "cuda"):
        accumulator = HessianAccumulator(1040, device, torch.float64)
        accumulator.add(x.to(device))
        factors.append(factorize(accumulator.matrix, by_activity(accumulator.diagonal), [], "linear"))
    torch.testing.assert_close(factors[1].feedback.cpu(), factors[0].feedback)
    torch.testing.assert_close(factors[1].cost.cpu(), factors[0].cost)
