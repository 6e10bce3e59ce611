"""Bit for bit against compressed-tensors: its scales, its codes, its packing, its dynamic activations."""

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from fourge.nvfp4 import e2m1
from fourge.nvfp4.quantize import dequantize_weight, fake_quantize, global_scale, group_scales, quantize_weight

SCHEME: QuantizationScheme = preset_name_to_scheme("NVFP4", ["Linear"])


def weights(seed: int) -> dict[str, torch.Tensor]:
    """FP32 weights `[24, 64]` of many kinds."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(24, 64, generator=generator)
    spread = torch.exp(4 * torch.randn(24, 64, generator=generator))
    dead = normal.clone()
    dead[5], dead[:, 32:48] = 0, 0
    return {
        "normal": normal * 0.02,
        "heavy tails": normal * spread,
        "BF16 values": normal.bfloat16().float(),
        "E2M1 values and ties": torch.randint(-24, 25, (24, 64), generator=generator) / 4,
        "dead rows and groups": dead,
        "signed zeros": torch.where(normal > 0, 0.0, -0.0),
        "tiny": normal * 1e-36,
        "subnormal": normal * 1e-40,
        "huge": normal / normal.abs().max() * 3.4e38,
    }


def their_scales(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """compressed-tensors' global scale and group scales of an FP32 weight."""
    divisor = generate_gparam(weight.min(), weight.max())
    grouped = weight.unflatten(1, (-1, 16))
    scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), SCHEME.weights, global_scale=divisor)
    return divisor, scales


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", weights(0))
def test_max_calibration_gives_their_scales_and_bytes(name: str, seed: int) -> None:
    weight = weights(seed)[name]
    divisor, scales = their_scales(weight)
    state = {"weight": weight, "weight_scale": scales, "weight_global_scale": divisor}
    theirs = NVFP4PackedCompressor.compress(state, SCHEME)
    ours = quantize_weight(weight, global_scale(weight.abs().max()))
    assert torch.equal(ours.global_scale, divisor)
    assert torch.equal(group_scales(weight, divisor), scales)
    assert torch.equal(ours.scale.view(torch.uint8), theirs["weight_scale"].view(torch.uint8))
    assert torch.equal(ours.packed, theirs["weight_packed"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(5))
def test_same_bytes_given_any_scales(seed: int, dtype: torch.dtype) -> None:
    """Scales that no calibration would choose, FP32 as a checkpoint's are once loaded: the bytes must still agree."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(24, 64, generator=generator) * 0.05).to(dtype)
    codes = torch.randint(1, 0x7F, (24, 4), generator=generator).to(torch.uint8)
    scales, divisor = codes.view(torch.float8_e4m3fn).float(), torch.rand(1, generator=generator) * 1e4 + 1
    state = {"weight": weight.float(), "weight_scale": scales, "weight_global_scale": divisor}
    theirs = NVFP4PackedCompressor.compress(state, SCHEME)
    ours = quantize_weight(weight, divisor, scales)
    assert torch.equal(ours.packed, theirs["weight_packed"])
    assert torch.equal(ours.scale.view(torch.uint8), theirs["weight_scale"].view(torch.uint8))


def test_packing_is_theirs() -> None:
    generator = torch.Generator().manual_seed(9)
    values = e2m1.decode(torch.randint(0, 16, (32, 64), generator=generator).to(torch.uint8))
    packed = e2m1.pack(e2m1.encode(values))
    assert torch.equal(packed, pack_fp4_to_uint8(values))
    assert torch.equal(e2m1.decode(e2m1.unpack(packed)), unpack_fp4_from_uint8(packed, 32, 64, torch.float32))


@pytest.mark.parametrize("name", weights(0))
def test_dequantized_values_are_theirs_in_bf16(name: str) -> None:
    """compressed-tensors decompresses to BF16; ours in FP32, rounded once to BF16, are the same numbers."""
    weight = weights(3)[name]
    ours = quantize_weight(weight, global_scale(weight.abs().max()))
    state = {
        "weight_packed": ours.packed,
        "weight_scale": ours.scale,
        "weight_global_scale": ours.global_scale,
    }
    theirs = NVFP4PackedCompressor.decompress(state, SCHEME)["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(dequantize_weight(ours, dtype=torch.bfloat16), theirs)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", weights(0))
def test_dynamic_activations_are_theirs(name: str, factor: float) -> None:
    """Also where the input leaves the calibrated range, or uses a part of it."""
    x = weights(4)[name].view(2, 12, 64)
    module = torch.nn.Linear(64, 8)
    module.quantization_status = QuantizationStatus.FROZEN
    module.input_global_scale = global_scale(x.abs().max() * factor).reshape(1)
    theirs = forward_quantize(module, x, "input", SCHEME.input_activations)
    ours = fake_quantize(x, module.input_global_scale)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_where_a_bf16_intermediate_makes_them_differ() -> None:
    """The example of docs/numerics.md: given BF16 tensors, compressed-tensors' intermediates are BF16 too."""
    weight = torch.tensor([[0.46875] + [0.1] * 15], dtype=torch.bfloat16)
    exact = global_scale(weight.abs().max())
    assert float(exact) == pytest.approx(5734.4)
    group = weight.unflatten(1, (-1, 16))
    in_bf16, _ = calculate_qparams(group.amin(-1), group.amax(-1), SCHEME.weights)
    sixth = 0.46875 / 6
    assert float(group.amax(-1).float() / 6) == sixth == 0.078125
    reciprocal = weight.abs().max().reciprocal()
    assert float(reciprocal) == 2.140625 and float(1 / 0.46875) == pytest.approx(2.13333, abs=1e-5)
    assert float((reciprocal * 2688).bfloat16()) == 5760.0
    assert in_bf16.dtype == torch.bfloat16
