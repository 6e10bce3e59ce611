"""What GPTQ promises, and a textbook loop beside it."""

from typing import Any

import pytest
import torch
from method_problems import ORDERS, curvature_of, max_scales, output_error, problem, same_bytes
from textbook_twins import dampened, gptq_textbook

from fourge.methods import sweep
from fourge.methods.gptq import gptq
from fourge.methods.hessian import Curvature, by_activity, factorize
from fourge.nvfp4 import e2m1
from fourge.nvfp4.quantize import (
    QuantizedWeight,
    dequantize_weight,
    quantize_weight,
)


@pytest.mark.parametrize("order_of", ORDERS)
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_diagonal_hessian_is_rounding_to_the_nearest(order_of: Any, block_size: int) -> None:
    weight = problem(0, rows=40, columns=160)[0].bfloat16()
    weight[3, ::2] = 0.0
    weight[4, 5] = -0.0
    weight[:, 32:48] = 0.0
    scales, divisor = max_scales(weight)
    diagonal = torch.rand(160) * 100
    curvature = factorize(torch.diag(diagonal), order_of(diagonal), [], "linear")
    got = gptq(weight, scales, divisor, curvature, block_size)
    assert same_bytes(got, quantize_weight(weight, divisor, scales))
    assert got.global_scale.equal(divisor.reshape(1))


@pytest.mark.parametrize("seed", range(5))
def test_textbook_loop_agrees_in_fp64(seed: int) -> None:
    weight, x = problem(seed)
    scales, divisor = max_scales(weight)
    hessian = x.double().T @ x.double()
    got = gptq(weight, scales, divisor, factorize(hessian.clone(), torch.arange(64), [], "linear"))
    expected = gptq_textbook(weight.double(), scales.double() / divisor.double(), dampened(hessian, 0.05))
    assert e2m1.decode(e2m1.unpack(got.packed)).double().equal(expected)
    assert got.scale.float().equal(scales)


def test_walk_order_is_the_textbook_on_columns_in_that_order() -> None:
    weight, x = problem(11)
    scales, divisor = max_scales(weight)
    hessian = x.double().T @ x.double()
    order = by_activity(hessian.diagonal())
    got = gptq(weight, scales, divisor, factorize(hessian.clone(), order, [], "linear"))
    in_order = gptq_textbook(
        weight.double()[:, order],
        scales.double()[:, order[::16] // 16] / divisor.double(),
        dampened(hessian, 0.05)[order][:, order],
    )
    assert e2m1.decode(e2m1.unpack(got.packed)).double()[:, order].equal(in_order)
    assert got.scale.float().equal(scales)


@pytest.mark.parametrize("order_of", ORDERS)
def test_block_size_changes_nothing_in_fp64(order_of: Any) -> None:
    weight, x = problem(1, rows=32, columns=208)
    scales, divisor = max_scales(weight)
    curvature = curvature_of(x.double(), order_of)
    results = [gptq(weight, scales, divisor, curvature, block_size) for block_size in (1, 16, 48, 128, 208)]
    assert all(same_bytes(result, results[0]) for result in results)


def test_rows_in_chunks_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = problem(2)
    scales, divisor = max_scales(weight)
    curvature = curvature_of(x.double(), by_activity)
    whole = gptq(weight, scales, divisor, curvature)
    monkeypatch.setitem(sweep.VALUES_PER_CHUNK, "cpu", 5 * 64)
    assert same_bytes(gptq(weight, scales, divisor, curvature), whole)


@pytest.mark.parametrize("order_of", ORDERS)
@pytest.mark.parametrize("seed", range(20))
def test_output_error_is_below_rounding_to_the_nearest(seed: int, order_of: Any) -> None:
    weight, x = problem(seed)
    scales, divisor = max_scales(weight)
    got = gptq(weight, scales, divisor, curvature_of(x, order_of))
    assert output_error(x, weight, got) < output_error(x, weight, quantize_weight(weight, divisor, scales))


@pytest.mark.parametrize("order_of", ORDERS)
def test_zero_inputs_round_to_the_nearest(order_of: Any) -> None:
    weight, x = problem(3)
    scales, divisor = max_scales(weight)
    events: list[dict[str, Any]] = []
    got = gptq(weight, scales, divisor, curvature_of(torch.zeros_like(x), order_of, events))
    assert same_bytes(got, quantize_weight(weight, divisor, scales))
    assert [event["event"] for event in events] == ["inputs are all zero"]


def test_weights_of_a_dead_channel_round_to_the_nearest() -> None:
    weight, x = problem(4)
    x[:, 21] = 0
    scales, divisor = max_scales(weight)
    events: list[dict[str, Any]] = []
    got = gptq(weight, scales, divisor, curvature_of(x, by_activity, events))
    nearest = quantize_weight(weight, divisor, scales)
    assert dequantize_weight(got)[:, 21].equal(dequantize_weight(nearest)[:, 21])
    assert events == [{"event": "input channels never active", "linear": "linear", "channels": 1}]


def test_one_hot_channel() -> None:
    weight, x = problem(5)
    x[:, :7] = 0
    x[:, 8:] = 0
    events: list[dict[str, Any]] = []
    scales, divisor = max_scales(weight)
    got = gptq(weight, scales, divisor, curvature_of(x, by_activity, events))
    assert same_bytes(got, quantize_weight(weight, divisor, scales))
    assert [event["channels"] for event in events] == [63]


def test_rank_deficient_inputs_stay_finite_and_better() -> None:
    weight, x = problem(6, columns=256, tokens=5)
    scales, divisor = max_scales(weight)
    hessian = x.T @ x
    events: list[dict[str, Any]] = []
    curvature = factorize(hessian.clone(), torch.arange(256), events, "linear", dampening=1e-12)
    got = gptq(weight, scales, divisor, curvature)
    assert {event["event"] for event in events} == {"dampening raised"}
    assert dequantize_weight(got).isfinite().all()
    assert output_error(x, weight, got) < output_error(x, weight, quantize_weight(weight, divisor, scales))


@pytest.mark.gpu
@pytest.mark.parametrize("order_of", ORDERS)
def test_gpu_gives_the_cpus_bytes_in_fp64(order_of: Any) -> None:
    weight, x = problem(7)
    scales, divisor = max_scales(weight)
    curvature = curvature_of(x.double(), order_of)
    there = Curvature(curvature.order.cuda(), curvature.feedback.cuda(), curvature.cost.cuda())
    got = gptq(weight.cuda(), scales.cuda(), divisor.cuda(), there)
    assert got.packed.is_cuda
    on_cpu = QuantizedWeight(got.packed.cpu(), got.scale.cpu(), got.global_scale.cpu())
    assert same_bytes(on_cpu, gptq(weight, scales, divisor, curvature))
