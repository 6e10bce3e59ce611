"""Whatever 16 finite FP32 numbers a group holds: bytes and values are the specification's, to the bit."""

import math
import struct

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from fourge.nvfp4 import e2m1, e4m3, reference
from fourge.nvfp4.quantize import amax, dequantize_weight, fake_quantize, global_scale, group_scales, quantize_weight

pytestmark = [
    pytest.mark.usefixtures("every_backend"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy, as Triton's interpreter
]
WEIGHTS = preset_name_to_scheme("NVFP4", ["Linear"]).weights
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MODERATE = st.floats(width=32, min_value=-1.0, max_value=1.0)
GROUP = st.lists(FINITE, min_size=16, max_size=16) | st.lists(MODERATE, min_size=16, max_size=16)
DIVISOR = st.floats(width=32, min_value=2.0**-126, allow_infinity=False)
EXAMPLES = {"torch": 300, "numba": 300, "triton": 50}
"""Triton's interpreter takes its time."""

POSITIVE_SCALE = st.integers(1, 0x7E).map(reference.e4m3_decode)


def float_bits(values: list[float]) -> bytes:
    return struct.pack(f"{len(values)}f", *values)


def specified(values: list[float], scale: float, divisor: float) -> tuple[list[int], list[float]]:
    """Bytes and restored values of a group, one number at a time."""
    rounded = [reference.quantize_value(value, scale, divisor) for value in values]
    codes = [reference.e2m1_encode(value) for value in rounded]
    packed = [reference.pack(low, high) for low, high in zip(codes[::2], codes[1::2], strict=True)]
    return packed, [reference.dequantize_value(value, scale, divisor) for value in rounded]


def test_given_scales(every_backend: str) -> None:
    @settings(deadline=None, derandomize=True, max_examples=EXAMPLES[every_backend])
    @given(group=GROUP, scale=POSITIVE_SCALE, divisor=DIVISOR)
    def check(group: list[float], scale: float, divisor: float) -> None:
        weight = torch.tensor([group], dtype=torch.float32)
        ours = quantize_weight(weight, torch.tensor(divisor), torch.tensor([[scale]]))
        packed, restored = specified(group, scale, divisor)
        assert ours.packed[0].tolist() == packed
        assert float(ours.scale.float()) == scale
        assert float_bits(dequantize_weight(ours)[0].tolist()) == float_bits(restored)

    check()


def test_max_scales_and_activations(every_backend: str) -> None:
    """Under the group's own global scale, and under one that fits it badly."""

    @settings(deadline=None, derandomize=True, max_examples=EXAMPLES[every_backend])
    @given(group=GROUP, divisor=st.none() | DIVISOR)
    def check(group: list[float], divisor: float | None) -> None:
        x = torch.tensor([group], dtype=torch.float32)
        largest = max(map(abs, group))
        exact = reference.global_scale(largest) if divisor is None else divisor
        if divisor is None:
            assert float(global_scale(amax(x))) == exact
        scale = reference.group_scale(largest, exact)
        ours = quantize_weight(x, torch.tensor(exact))
        packed, restored = specified(group, scale, exact)
        assert float(ours.scale.float()) == scale
        assert ours.packed[0].tolist() == packed
        assert float_bits(fake_quantize(x, torch.tensor(exact))[0].tolist()) == float_bits(restored)

    check()


EDGES = {
    "0": 0.0,
    "the smallest subnormal": 2.0**-149,
    "the smallest normal": 2.0**-126,
    "1e-38": 1e-38,
    "just overflowing": 7.899e-36,
    "just not": 7.9e-36,
    "BF16's largest": torch.finfo(torch.bfloat16).max,
    "FP32's largest": torch.finfo(torch.float32).max,
}


@pytest.mark.parametrize("name", EDGES)
def test_global_scale_at_the_edges_is_theirs(name: str) -> None:
    largest = torch.tensor(EDGES[name], dtype=torch.float32)
    assert torch.equal(global_scale(largest).reshape(1), generate_gparam(-largest, largest))
    assert float(global_scale(largest)) == reference.global_scale(float(largest))


@pytest.mark.parametrize("largest", [0.46875, 3.921875, 0.1015625])
def test_group_scales_around_their_ties_are_theirs(largest: float) -> None:
    """A group's largest magnitude where the product is next to a tie of E4M3's: the order of the steps decides."""
    divisor = global_scale(torch.tensor([largest]))
    grid = torch.tensor([reference.e4m3_decode(code) for code in range(0x7F)])
    ties = (grid[1:] + grid[:-1]) / 2
    near = (6 * ties / divisor).view(torch.int32)[:, None] + torch.arange(-4, 5, dtype=torch.int32)
    group_amax = near.view(torch.float32).reshape(-1, 1)
    theirs, _ = calculate_qparams(-group_amax, group_amax, WEIGHTS, global_scale=divisor)
    assert torch.equal(group_scales(group_amax.expand(-1, 16).contiguous(), divisor), theirs)
    product_first = e4m3.round(group_amax * divisor / 6)
    assert not torch.equal(product_first.clamp_min(e4m3.MIN_POSITIVE), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_amax_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    for sign in (1, -1):
        x[3, 4] = 5.0625 * sign
        assert amax(x).dtype == torch.float32 and float(amax(x)) == 5.0625
    assert float(amax(torch.zeros(2, 16, dtype=dtype))) == 0


def test_infinities_saturate_and_nan_stays() -> None:
    """Neither is accepted input: readers refuse them. Rounding at least hides no NaN."""
    x = torch.tensor([math.inf, -math.inf, math.nan])
    assert e2m1.round(x)[:2].tolist() == [6.0, -6.0] and e2m1.round(x)[2].isnan()
    assert e4m3.round(x)[:2].tolist() == [448.0, -448.0] and e4m3.round(x)[2].isnan()
    assert amax(x[2:]).isnan()
