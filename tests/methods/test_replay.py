"""What replay promises, and a twin of the five steps, row by row, beside it."""

from typing import Any

import pytest
import torch
from method_problems import ORDERS, curvature_of, max_scales, output_error, problem, same_bytes
from textbook_twins import dampened, replay_textbook
from torch import Tensor

from fourge.methods import sweep
from fourge.methods.gptq import gptq
from fourge.methods.hessian import Curvature, by_activity, factorize
from fourge.methods.replay import replay
from fourge.nvfp4 import e2m1
from fourge.nvfp4.quantize import QuantizedWeight, dequantize_weight, quantize_weight


def values_of(quantized: QuantizedWeight) -> Tensor:
    return e2m1.decode(e2m1.unpack(quantized.packed)).double()


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_textbook_twin_agrees_in_fp64(seed: int, window: int) -> None:
    weight, x = problem(seed, rows=6, columns=64)
    scales, divisor = max_scales(weight)
    hessian = x.double().T @ x.double()
    got = replay(weight, scales, divisor, factorize(hessian.clone(), torch.arange(64), [], "linear"), window)
    values, chosen = replay_textbook(weight.double(), scales.double(), divisor.item(), dampened(hessian, 0.05), window)
    assert got.scale.double().equal(chosen)
    assert values_of(got).equal(values)
    assert not chosen.equal(scales.double())


def test_walk_order_is_the_twin_on_columns_in_that_order() -> None:
    weight, x = problem(8, rows=6, columns=64)
    scales, divisor = max_scales(weight)
    hessian = x.double().T @ x.double()
    order = by_activity(hessian.diagonal())
    groups = order[::16] // 16
    assert groups.tolist() != [0, 1, 2, 3]
    got = replay(weight, scales, divisor, factorize(hessian.clone(), order, [], "linear"))
    values, chosen = replay_textbook(
        weight.double()[:, order],
        scales.double()[:, groups],
        divisor.item(),
        dampened(hessian, 0.05)[order][:, order],
        4,
    )
    assert got.scale.double()[:, groups].equal(chosen)
    assert values_of(got)[:, order].equal(values)


@pytest.mark.parametrize("order_of", ORDERS)
@pytest.mark.parametrize("seed", range(20))
def test_output_error_is_below_gptqs(seed: int, order_of: Any) -> None:
    weight, x = problem(seed)
    scales, divisor = max_scales(weight)
    curvature = curvature_of(x, order_of)
    replayed = output_error(x, weight, replay(weight, scales, divisor, curvature))
    assert replayed < output_error(x, weight, gptq(weight, scales, divisor, curvature))


def test_rows_in_chunks_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = problem(2)
    scales, divisor = max_scales(weight)
    curvature = curvature_of(x.double(), by_activity)
    whole = replay(weight, scales, divisor, curvature)
    monkeypatch.setitem(sweep.VALUES_PER_CHUNK, "cpu", 5 * 64)
    assert same_bytes(replay(weight, scales, divisor, curvature), whole)


def test_diagonal_hessian_never_errs_more_than_max() -> None:
    weight, _ = problem(9, rows=40)
    weight[:, 16:32] = 0
    scales, divisor = max_scales(weight)
    diagonal = torch.rand(64)
    got = replay(weight, scales, divisor, factorize(torch.diag(diagonal), torch.arange(64), [], "linear"))

    def error(quantized: QuantizedWeight) -> Tensor:
        damped = diagonal + 0.05 * diagonal.mean()
        return ((weight - dequantize_weight(quantized)).double().square() * damped).view(40, 4, 16).sum(-1)

    ours, max_error = error(got), error(quantize_weight(weight, divisor, scales))
    assert (ours <= max_error * (1 + 1e-6)).all() and ours.sum() < 0.9 * max_error.sum()
    assert got.scale[:, 1].float().equal(scales[:, 1])  # a group of zeros keeps the scale it came with


@pytest.mark.parametrize("case", ["zero", "one hot", "dead", "rank deficient"])
@pytest.mark.parametrize("order_of", ORDERS)
def test_degenerate_inputs_stay_finite_and_are_recorded(order_of: Any, case: str) -> None:
    weight, x = problem(10, columns=256, tokens=300)
    if case == "zero":
        x.zero_()
    elif case == "one hot":
        x[:, 1:] = 0
    elif case == "dead":
        x[:, 40] = 0
    else:
        x = x[:4]
    hessian = x.T @ x
    events: list[dict[str, Any]] = []
    dampening = 1e-12 if case == "rank deficient" else 0.05
    curvature = factorize(hessian.clone(), order_of(hessian.diagonal()), events, "linear", dampening)
    scales, divisor = max_scales(weight)
    got = replay(weight, scales, divisor, curvature)
    assert dequantize_weight(got).isfinite().all()
    expected = {
        "zero": "inputs are all zero",
        "one hot": "input channels never active",
        "dead": "input channels never active",
        "rank deficient": "dampening raised",
    }[case]
    assert {event["event"] for event in events} == {expected}
    if case != "zero":
        assert output_error(x, weight, got) < output_error(x, weight, quantize_weight(weight, divisor, scales))


@pytest.mark.gpu
@pytest.mark.parametrize("order_of", ORDERS)
def test_gpu_gives_the_cpus_bytes_in_fp64(order_of: Any) -> None:
    weight, x = problem(7)
    scales, divisor = max_scales(weight)
    curvature = curvature_of(x.double(), order_of)
    there = Curvature(curvature.order.cuda(), curvature.feedback.cuda(), curvature.cost.cuda())
    got = replay(weight.cuda(), scales.cuda(), divisor.cuda(), there)
    on_cpu = QuantizedWeight(got.packed.cpu(), got.scale.cpu(), got.global_scale.cpu())
    assert same_bytes(on_cpu, replay(weight, scales, divisor, curvature))
