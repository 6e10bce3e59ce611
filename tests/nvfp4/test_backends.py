"""Every backend against every other, bit for bit: whatever one computes, the others do."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from fourge.methods.hessian import Curvature, by_activity, factorize
from fourge.methods.replay import replay
from fourge.methods.scale_search import search_scales
from fourge.nvfp4 import backend
from fourge.nvfp4.quantize import (
    QuantizedWeight,
    amax,
    dequantize_weight,
    fake_quantize,
    global_scale,
    group_scales,
    quantize_weight,
    squared_errors,
)

NeedsBackend = Callable[[str], None]
PAIRS = list(itertools.combinations(["torch", "numba", "triton"], 2))
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def weights() -> dict[str, Tensor]:
    """FP32, of odd shapes and with every kind of group."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heavy = normal(13, 1040) * torch.exp(3 * normal(13, 1040))
    sparse = normal(7, 96) * (normal(7, 96) > 1)
    uneven = normal(5, 1600) * torch.exp2((20 * normal(5, 100)).round()).repeat_interleave(16, 1)
    return {
        "normal": normal(64, 512),
        "heavy tails": heavy.clamp(-6e4, 6e4),
        "sparse": sparse,
        "uneven groups": uneven.clamp(-6e4, 6e4),
        "one group": normal(1, 16),
        "on the grid": torch.randint(-12, 13, (9, 64), generator=generator) / 2,
        "zero": torch.zeros(3, 32),
    }


def bits(tensors: tuple[Tensor, ...]) -> list[bytes]:
    return [bytes(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()) for tensor in tensors]


def everything(weight: Tensor, divisor: Tensor, importance: Tensor) -> list[bytes]:
    """What a backend makes of a weight, all of it."""
    plain = quantize_weight(weight, divisor)
    results: list[Tensor] = [amax(weight).reshape(1)]
    for h in (None, importance):
        scales = search_scales(weight, divisor, h)
        searched = quantize_weight(weight, divisor, scales)
        results += [scales, searched.packed, searched.scale, *squared_errors(weight, searched)]
    results += [plain.packed, plain.scale, *squared_errors(weight, plain), fake_quantize(weight, divisor)]
    results += [fake_quantize(weight, divisor * 3)]  # the largest groups saturate
    results += [dequantize_weight(plain, dtype=dtype) for dtype in DTYPES]
    results += [dequantize_weight(plain, slice(1, None)), fake_quantize(weight[:, :16], divisor)]
    return bits(tuple(results))


@cache
def computed(name: str, dtype: torch.dtype, backend_name: str, device: str = "cpu") -> list[bytes]:
    """`everything` of a weight of `weights`."""
    weight = weights()[name].to(dtype)
    divisor = global_scale(torch.stack(torch.aminmax(weight)).abs().max().float()).reshape(1)
    generator = torch.Generator().manual_seed(4)
    importance = torch.exp(2 * torch.randn(weight.shape[1], generator=generator))
    importance[::7] = 0
    with backend.using(backend_name):
        return everything(*(x.to(device) for x in (weight, divisor, importance)))


# FP16 goes through torch but for the search, and Triton's interpreter takes its time.
INTERPRETED_IN_FP16 = ["one group", "sparse"]
CASES = [
    (name, dtype, pair)
    for name, dtype, pair in itertools.product(weights(), DTYPES, PAIRS)
    if dtype != torch.float16 or "triton" not in pair or name in INTERPRETED_IN_FP16
]


@pytest.mark.parametrize(("name", "dtype", "pair"), CASES, ids=str)
def test_backends_agree(name: str, dtype: torch.dtype, pair: tuple[str, str], needs_backend: NeedsBackend) -> None:
    for needed in pair:
        needs_backend(needed)
    one, other = (computed(name, dtype, backend_name) for backend_name in pair)
    assert one == other


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", weights())
def test_gpu_gives_the_bits_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    on_cpu = computed(name, dtype, "torch")
    assert computed(name, dtype, "torch", "cuda") == on_cpu
    assert computed(name, dtype, "triton", "cuda") == on_cpu


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, as Triton's interpreter
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("exponent", [-120, -30, 4, 20, 40, 110])
def test_backends_agree_at_the_ends_of_the_range(
    exponent: int, dtype: torch.dtype, pair: tuple[str, str], needs_backend: NeedsBackend
) -> None:
    """Where quotients underflow, remainders do, or nothing does: Triton divides in two ways."""
    for needed in pair:
        needs_backend(needed)
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(4, 64, generator=generator) * 2.0**exponent
    weight[:, ::5] *= torch.exp2(torch.randint(-140, 0, (4, 13), generator=generator).float())
    weight[:, 3:7] = torch.tensor([-0.0, 0.0, 2.0**-133, -(2.0**-149)])
    weight = weight.to(dtype)
    divisor = global_scale(torch.stack(torch.aminmax(weight)).abs().max().float())
    results = []
    for one in pair:
        with backend.using(one):
            quantized = quantize_weight(weight, divisor)
            parts = quantized.packed, quantized.scale, dequantize_weight(quantized, dtype=dtype)
            results.append(bits((*parts, fake_quantize(weight, divisor), fake_quantize(weight, divisor / 8))))
    assert results[0] == results[1]


@cache
def replayed(exponent: int, backend_name: str, device: str = "cpu") -> list[bytes]:
    """A small weight of this magnitude after Schur replay. Its groups take what those before them leave."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(35, 48, generator=generator) * 2.0**exponent
    weight[:2, :16] = 0
    weight[2:4, 16:] *= 1e-6
    weight[5] = -0.0
    x = torch.randn(200, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    hessian = x.T @ x
    curvature = factorize(hessian, by_activity(hessian.diagonal().clone()), [], "linear")
    curvature = Curvature(*(part.to(device) for part in (curvature.order, curvature.feedback, curvature.cost)))
    divisor = global_scale(weight.abs().max())
    with backend.using("torch"):
        scales = group_scales(weight, divisor)
    with backend.using(backend_name):
        done = replay(*(part.to(device) for part in (weight, scales, divisor)), curvature, window=1)
    assert done.scale.float().cpu().ne(scales).any()
    return bits((done.packed, done.scale))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, as Triton's interpreter
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("exponent", [-5, 12])
def test_replay_takes_the_same_turns(exponent: int, pair: tuple[str, str], needs_backend: NeedsBackend) -> None:
    for needed in pair:
        needs_backend(needed)
    assert replayed(exponent, pair[0]) == replayed(exponent, pair[1])


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-5, 12])
def test_replay_takes_the_same_turns_on_a_gpu(exponent: int) -> None:
    """Between the groups there are matrix products: their order of sums is the device's, the same for both."""
    assert replayed(exponent, "torch", "cuda") == replayed(exponent, "triton", "cuda")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_not_a_number_spoils_its_group_alone(dtype: torch.dtype, every_backend: str) -> None:
    x = torch.ones(2, 48, dtype=dtype)
    x[1, 20] = torch.nan
    quantized = fake_quantize(x, torch.tensor(448.0))
    assert quantized.isnan().nonzero().tolist() == [[1, k] for k in range(16, 32)]


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_threads_change_nothing(name: str, needs_backend: NeedsBackend) -> None:
    needs_backend(name)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(300, 4096, generator=generator).bfloat16()
    divisor = global_scale(amax(weight))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with backend.using(name):
                quantized = quantize_weight(weight, divisor)
                restored, activations = dequantize_weight(quantized), fake_quantize(weight, divisor)
            results.append(bits((quantized.packed, quantized.scale, restored, activations)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_memory_that_is_not_contiguous(every_backend: str) -> None:
    generator = torch.Generator().manual_seed(6)
    turned = torch.randn(64, 32, generator=generator).T
    divisor = global_scale(amax(turned))
    one, other = quantize_weight(turned, divisor), quantize_weight(turned.contiguous(), divisor)
    assert bits((one.packed, one.scale)) == bits((other.packed, other.scale))
    assert fake_quantize(turned, divisor).equal(fake_quantize(turned.contiguous(), divisor))
    every_other = QuantizedWeight(one.packed[::2], one.scale[::2], one.global_scale)
    assert dequantize_weight(every_other).equal(dequantize_weight(one)[::2])


def test_what_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.resolve("torch", "cuda") == "torch"
    with pytest.raises(ValueError, match="no loops for cuda"):
        backend.resolve("numba", "cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="no loops for cpu"):
        backend.resolve("triton", "cpu")


def test_a_gpu_takes_triton_where_it_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_why_not", backend._why_not.__wrapped__)
    monkeypatch.setenv("CC", "cc")
    assert backend.resolve("auto", "cuda") == "triton"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert backend.resolve("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match="C compiler"):
        backend.resolve("triton", "cuda")


def test_without_numba_torch_computes() -> None:
    code = """
import sys
sys.modules["numba"] = None
import torch
from fourge.nvfp4 import backend
from fourge.nvfp4.quantize import quantize_weight
assert backend.resolve("auto", "cpu") == "torch"
try:
    backend.resolve("numba", "cpu")
except ValueError as error:
    assert "not installed" in str(error)
else:
    raise AssertionError
quantize_weight(torch.ones(1, 16), torch.tensor(1.0))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
