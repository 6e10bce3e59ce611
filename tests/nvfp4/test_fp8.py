"""FP8 with a scale a row and a token, against compressed-tensors' own compressor and forward."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from torch import Tensor, nn

from fourge.nvfp4.fp8 import dequantize_rows, fake_quantize_tokens, quantize_rows, squared_row_errors

SCHEME = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
COMPRESSOR = BaseCompressor.get_value_from_registry("float-quantized")


def weight_of(dtype: torch.dtype) -> Tensor:
    """Rows from tiny to huge, one of zeros, one that is one value, and more of them than fit in a block."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1100, 272, generator=generator)
    weight *= torch.logspace(-3, 2, len(weight))[:, None]
    weight[7] = 0.0
    weight[8] = -0.375
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_compressed_tensors_bytes(dtype: torch.dtype) -> None:
    """The scale from its own rule in the weight's dtype; the codes, in FP32, from its own compressor."""
    weight = weight_of(dtype)
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    scale, _ = calculate_qparams(low, high, SCHEME.weights)
    ours = quantize_rows(weight)
    assert ours.scale.dtype == dtype and torch.equal(ours.scale, scale)
    stored = {"weight": weight.float(), "weight_scale": scale.float()}
    theirs = COMPRESSOR.compress(stored, SCHEME)
    assert torch.equal(ours.codes.view(torch.uint8), theirs["weight"].view(torch.uint8))
    back = COMPRESSOR.decompress(theirs, SCHEME)["weight"]
    assert torch.equal(dequantize_rows(ours), back)
    assert torch.equal(dequantize_rows(ours, slice(3, 9), torch.bfloat16), back[3:9].bfloat16())


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 1, 32), (1, 3000, 272)])
def test_activations_are_compressed_tensors_forward(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 30
    x[0, 0] = 0.0
    x[0, -1, 3] = 5e4
    scale, zero_point = compute_dynamic_scales_and_zp(x, SCHEME.input_activations, nn.Identity())
    expected = fake_quantize(x, scale, zero_point, SCHEME.input_activations)
    assert torch.equal(fake_quantize_tokens(x), expected)


def test_squared_errors_are_those_of_the_values() -> None:
    weight = weight_of(torch.bfloat16)
    stored = quantize_rows(weight)
    errors, norms = squared_row_errors(weight, stored)
    wide = weight.double()
    expected = (dequantize_rows(stored).double() - wide).square().sum(1)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms.double(), wide.square().sum(1), rtol=1e-5, atol=0)
    # Half a step at most: 2^-4 of a value, but for what is below E4M3's normal range.
    assert bool((errors.sqrt() <= 2**-4 * norms.sqrt()).all())
