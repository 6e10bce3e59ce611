"""The tensor code against the scalar specification, number by number, compared with `==` on bits."""

import itertools
import math
import struct

import pytest
import torch

from fourge.nvfp4 import e2m1, e4m3, reference
from fourge.nvfp4.backend import using
from fourge.nvfp4.quantize import (
    QuantizedWeight,
    dequantize_weight,
    fake_quantize,
    global_scale,
    group_scales,
    quantize_weight,
)

pytestmark = [
    pytest.mark.usefixtures("every_backend"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy, as Triton's interpreter
]


def bits(x: torch.Tensor) -> list[int]:
    return x.float().contiguous().view(torch.int32).flatten().tolist()


def float_bits(x: float) -> int:
    value: int = struct.unpack("<i", struct.pack("<f", x))[0]
    return value


def all_finite_bf16() -> torch.Tensor:
    """Every finite BF16 value, in FP32; NaN and Inf are refused when a source is read."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
    return values[values.isfinite()]


def ties_and_neighbours() -> torch.Tensor:
    """The seven midpoints of E2M1, both signs, each with its FP32 neighbours, and both zeros."""
    grid = reference.E2M1_MAGNITUDES
    ties = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(grid)])
    infinity = torch.tensor(math.inf)
    near = torch.cat((ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)))
    return torch.cat((near, -near, torch.tensor([0.0, -0.0, 6.0, 7.0, -7.0, 1e30, -1e30])))


CASES = {"every BF16": all_finite_bf16(), "ties": ties_and_neighbours()}


@pytest.mark.parametrize("name", CASES)
def test_e2m1_rounds_and_encodes_as_the_reference(name: str) -> None:
    x = CASES[name]
    rounded, codes = e2m1.round(x), e2m1.encode(x)
    expected = [reference.e2m1_round(value) for value in x.tolist()]
    assert bits(rounded) == [float_bits(value) for value in expected]
    assert e2m1.encode(rounded).tolist() == [reference.e2m1_encode(value) for value in expected]
    assert bits(e2m1.decode(codes) + 0.0) == bits(rounded + 0.0), "encoding rounds alike, but for the sign of zeros"


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.round(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert e2m1.round(-ties).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    assert bits(e2m1.round(torch.tensor([-0.0, -0.1, 0.1]))) == bits(torch.tensor([0.0, -0.0, 0.0]))
    assert e2m1.encode(torch.tensor([-0.0, 0.0])).tolist() == [8, 0]


def test_all_codes_decode_and_pack_as_the_reference() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert bits(e2m1.decode(codes)) == [float_bits(reference.e2m1_decode(code)) for code in range(16)]
    pairs = torch.tensor(list(itertools.product(range(16), repeat=2)), dtype=torch.uint8)
    packed = e2m1.pack(pairs)
    assert packed.flatten().tolist() == [reference.pack(low, high) for low, high in pairs.tolist()]
    assert torch.equal(e2m1.unpack(packed), pairs)
    assert [reference.unpack(byte) for byte in packed.flatten().tolist()] == [tuple(pair) for pair in pairs.tolist()]


def test_golden_bytes() -> None:
    values = [0.5, -6, 0, -0.0, 1, 1.5, 2, 3, 4, -0.5, -1, -1.5, -2, -3, -4, 6]
    packed = e2m1.pack(e2m1.encode(torch.tensor(values)))
    assert bytes(packed.tolist()).hex(" ") == "f1 80 32 54 96 ba dc 7e"


def test_every_e4m3_code_decodes_as_torch_and_the_reference() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    decoded = e4m3.decode(codes.view(torch.float8_e4m3fn)).tolist()
    for code, value in enumerate(decoded):
        expected = reference.e4m3_decode(code)
        assert value == expected or (math.isnan(value) and math.isnan(expected))
        if not math.isnan(expected):
            assert reference.e4m3_encode(expected) == code


def test_e4m3_rounds_as_the_reference() -> None:
    grid = sorted(reference.e4m3_decode(code) for code in range(0x7F))
    ties = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(grid)])
    infinity = torch.tensor(math.inf)
    x = torch.cat((ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity), CASES["every BF16"]))
    x = torch.cat((x, -ties, torch.tensor([464.0, 465.0, 1e9, -1e9])))
    expected = [reference.e4m3_round(value) for value in x.tolist()]
    assert bits(e4m3.round(x)) == [float_bits(value) for value in expected]
    codes = e4m3.encode(x).view(torch.uint8).tolist()
    assert codes == [reference.e4m3_encode(value) for value in expected]


AMAXES = [
    0.0,
    1e-45,
    1e-38,
    1.18e-38,
    7.8e-36,
    7.9e-36,
    8e-36,
    1e-30,
    0.46875,
    1.0,
    2688.0,
    3.38e38,
    3.4028234663852886e38,
]


@pytest.mark.parametrize("amax", AMAXES)
def test_global_scale_at_the_edges(amax: float) -> None:
    amax = reference.fp32(amax)
    scale = float(global_scale(torch.tensor(amax)))
    assert scale == reference.global_scale(amax)
    assert 0 < scale < math.inf


def groups() -> dict[str, torch.Tensor]:
    """Rows of 64 values, `[n, 64]`, ordinary and at the edges."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(40, 64, generator=generator)
    heavy = normal * torch.exp(3 * torch.randn(40, 64, generator=generator))
    zero_groups = normal.clone()
    zero_groups[:, 16:32] = 0
    zero_groups[3] = -0.0
    uneven = normal.clone()
    uneven[:, :16] *= 1e-7
    uneven[:, 16:32] *= 1e5
    return {
        "normal": normal,
        "heavy tails": heavy,
        "BF16": normal.bfloat16().float(),
        "zero groups": zero_groups,
        "a million million between groups": uneven,
        "near underflow": normal * 1e-38,
        "near overflow": normal / normal.abs().max() * 3.4e38,
        "all zero": torch.zeros(4, 64),
    }


@pytest.mark.parametrize("name", groups())
def test_weights_quantize_as_the_reference(name: str) -> None:
    weight = groups()[name]
    divisor = global_scale(weight.abs().max())
    ours = quantize_weight(weight, divisor)
    restored = dequantize_weight(ours)
    for row, scales, packed, back in zip(
        weight.tolist(), ours.scale.float().tolist(), ours.packed, restored.tolist(), strict=True
    ):
        codes = e2m1.unpack(packed).tolist()
        for group, scale in enumerate(scales):
            values = row[16 * group : 16 * group + 16]
            assert scale == reference.group_scale(max(map(abs, values)), float(divisor))
            for column, value in enumerate(values):
                expected = reference.quantize_value(value, scale, float(divisor))
                assert codes[16 * group + column] == reference.e2m1_encode(expected)
                assert back[16 * group + column] == reference.dequantize_value(expected, scale, float(divisor))


@pytest.mark.parametrize("name", groups())
def test_activations_quantize_as_the_reference(name: str) -> None:
    x = groups()[name]
    divisor = global_scale(x.abs().max() / 3)  # a third of the range: the largest groups saturate
    for values, result in zip(x.view(-1, 16).tolist(), fake_quantize(x, divisor).view(-1, 16).tolist(), strict=True):
        scale = reference.group_scale(max(map(abs, values)), float(divisor))
        for value, got in zip(values, result, strict=True):
            rounded = reference.quantize_value(value, scale, float(divisor))
            assert float_bits(got) == float_bits(reference.dequantize_value(rounded, scale, float(divisor)))


def test_scales_are_never_zero_and_never_nan() -> None:
    x = torch.cat(list(groups().values()))
    for divisor in (1e-30, 1.0, 1e30):
        scales = group_scales(x, torch.tensor(divisor))
        assert bool(((scales > 0) & (scales <= e4m3.MAX)).all())


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(37, 96, generator=generator).bfloat16()
    divisor = global_scale(weight.abs().max())

    def run() -> tuple[QuantizedWeight, torch.Tensor, torch.Tensor]:
        quantized = quantize_weight(weight, divisor)
        return quantized, dequantize_weight(quantized), fake_quantize(weight, divisor)

    whole = run()
    monkeypatch.setattr("fourge.nvfp4.quantize._BLOCK_VALUES", 200)
    parts = run()
    assert torch.equal(whole[0].packed, parts[0].packed)
    assert torch.equal(whole[0].scale.view(torch.uint8), parts[0].scale.view(torch.uint8))
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[2], parts[2])
    assert torch.equal(whole[1][5:21], dequantize_weight(whole[0], slice(5, 21)))


def test_dtypes_of_results() -> None:
    weight = torch.randn(4, 32)
    quantized = quantize_weight(weight.bfloat16(), torch.tensor(100.0))
    assert (quantized.packed.dtype, quantized.scale.dtype) == (torch.uint8, torch.float8_e4m3fn)
    assert quantized.shape == (4, 32) and quantized.global_scale.shape == (1,)
    exact = dequantize_weight(quantized)
    assert torch.equal(dequantize_weight(quantized, dtype=torch.bfloat16), exact.bfloat16())
    x = torch.randn(2, 3, 32).bfloat16()
    assert torch.equal(fake_quantize(x, torch.tensor(50.0)), fake_quantize(x.float(), torch.tensor(50.0)).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("on_gpu", ["torch", "triton"])
@pytest.mark.parametrize("name", groups())
def test_cuda_gives_the_same_bits(name: str, on_gpu: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    weight = groups()[name]
    divisor = global_scale(weight.abs().max())
    here = quantize_weight(weight, divisor)
    restored, rounded = dequantize_weight(here), fake_quantize(weight, divisor)
    with using(on_gpu):
        there = quantize_weight(weight.cuda(), divisor.cuda())
        assert torch.equal(here.packed, there.packed.cpu())
        assert torch.equal(here.scale.view(torch.uint8), there.scale.view(torch.uint8).cpu())
        assert torch.equal(restored, dequantize_weight(there).cpu())
        assert torch.equal(rounded, fake_quantize(weight.cuda(), divisor.cuda()).cpu())
