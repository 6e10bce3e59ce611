"""The quotients of the loops for a GPU, which divide once a group, against IEEE's divisions: around every tie.

What a quotient decides is the index of an E2M1 value, and powers of two cancel: so all that can happen is a step's 2²³
significands, each with the numbers next to where the quotient is rounded to a tie, or not to it.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fourge.nvfp4 import e2m1

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fourge.nvfp4.triton_kernels import OPTIONS  # noqa: E402
from fourge.nvfp4.triton_loops import _INTERPRETED  # noqa: E402
from fourge.nvfp4.triton_rounding import divisor_of, eighth_of, index, max_scale, shifted, step_of  # noqa: E402

NeedsBackend = Callable[[str], None]
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
SIGNIFICANDS = 1 << 23
FEW = 1 << 12
CHUNK = 1 << 20

ON = [
    pytest.param("cpu", FEW, id="some"),
    pytest.param("cpu", SIGNIFICANDS, id="every", marks=pytest.mark.slow),
    pytest.param("cuda", SIGNIFICANDS, id="every on a GPU", marks=pytest.mark.gpu),
]


@triton.jit
def _indices(magnitude_ptr, step_ptr, global_ptr, result_ptr, fp32: tl.constexpr, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    divisor = divisor_of(global_ptr, not fp32)
    magnitude = tl.load(magnitude_ptr + i)
    magnitude, _ = shifted(magnitude, magnitude, divisor)
    tl.store(result_ptr + i, index(magnitude, eighth_of(tl.load(step_ptr + i), divisor), fp32) & 7)


@triton.jit
def _steps(scale_ptr, global_ptr, result_ptr, block: tl.constexpr):
    """A step of each scale under each divisor; a program has a divisor."""
    divisor = divisor_of(global_ptr + tl.program_id(0), True)
    scale = tl.load(scale_ptr + tl.arange(0, 8))
    tl.store(result_ptr + tl.program_id(0) * 8 + tl.arange(0, 8), step_of(scale, divisor))


@triton.jit
def _max_scales(largest_ptr, global_ptr, result_ptr, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    scale, _ = max_scale(tl.load(largest_ptr + i), divisor_of(global_ptr, True))
    tl.store(result_ptr + i, scale)


def launch(kernel: object, count: int, *arguments: Tensor, **constants: object) -> None:
    block = min(count, CHUNK if _INTERPRETED else 128)
    kernel[(triton.cdiv(count, block),)](*arguments, **constants, block=block, **OPTIONS)  # type: ignore[index]


def significands(count: int, device: str) -> Iterator[Tensor]:
    """FP32 numbers from 1 to 2: all, or some, half of them next to a quarter; in pieces."""
    numbers = torch.arange(SIGNIFICANDS, dtype=torch.int32)
    if count < SIGNIFICANDS:
        anywhere = torch.randint(SIGNIFICANDS, (count // 2,), generator=torch.Generator().manual_seed(0)).int()
        near = torch.arange(-count // 16, count // 16, dtype=torch.int32)
        quarters = torch.arange(4, dtype=torch.int32)[:, None] * (SIGNIFICANDS // 4)
        numbers = torch.cat((anywhere, ((quarters + near) % SIGNIFICANDS).flatten()))
    for part in (numbers + 0x3F800000).view(torch.float32).split(CHUNK):
        yield part.to(device)


def beside(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The numbers of so many bits that FP64 `x` lies between, FP32."""
    fraction, exponent = torch.frexp(x)
    below = torch.floor(torch.ldexp(fraction, torch.tensor(bits)))
    return tuple(torch.ldexp(n, exponent - bits).float() for n in (below, below + 1))  # type: ignore[return-value]


def bounds() -> list[float]:
    """The ties, and what is halfway between them and the FP32 numbers next to them."""
    ties = torch.tensor(TIES)
    near = [torch.nextafter(ties, torch.tensor(to)).double() for to in (0.0, 9.0)]
    return torch.cat((ties.double(), *((ties.double() + x) / 2 for x in near))).tolist()


def usable(device: str, needs_backend: NeedsBackend) -> None:
    if device == "cpu":
        needs_backend("triton")
    elif not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.mark.parametrize("divisor", [1e3, 1e-30, 1e30], ids=["ordinary", "small", "large"])
@pytest.mark.parametrize("bits", [8, 24], ids=["BF16", "FP32"])
@pytest.mark.parametrize(("device", "count"), ON)
def test_index_is_that_of_the_quotient(
    device: str, count: int, bits: int, divisor: float, needs_backend: NeedsBackend
) -> None:
    usable(device, needs_backend)
    global_scale = torch.tensor([divisor], device=device)
    for step in significands(count, device):
        result = torch.empty_like(step, dtype=torch.int32)
        for bound in bounds():
            for magnitude in beside(step.double() * bound, bits):
                launch(_indices, len(step), magnitude, step, global_scale, result, fp32=bits == 24)
                assert result.equal(e2m1.encode(e2m1.round(magnitude / step)).int()), bound


@pytest.mark.parametrize(("device", "count"), ON)
def test_step_is_the_quotient(device: str, count: int, needs_backend: NeedsBackend) -> None:
    usable(device, needs_backend)
    scale = torch.arange(8, 16, dtype=torch.float32, device=device)  # the significands of E4M3
    for divisor in significands(count if device == "cuda" else min(count, FEW // 8), device):
        result = torch.empty(len(divisor), 8, device=device)
        _steps[(len(divisor),)](scale, divisor, result, block=8, **OPTIONS)
        assert result.equal(scale / divisor[:, None])


@pytest.mark.parametrize(("device", "count"), ON)
def test_max_scale_is_from_the_sixth(device: str, count: int, needs_backend: NeedsBackend) -> None:
    usable(device, needs_backend)
    one = torch.ones(1, device=device)
    for part in significands(count, device):
        for largest in (part, 2 * part):
            result = torch.empty_like(largest)
            launch(_max_scales, len(largest), largest, one, result)
            assert result.equal((largest / 6).to(torch.float8_e4m3fn).float())
