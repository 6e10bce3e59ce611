"""FP8, for the Linears of a mixture that four bits hurt too much: compressed-tensors' preset FP8_DYNAMIC.

A weight has one scale a row (output channel), an activation one a token, computed at run time: the largest magnitude
goes to 448, E4M3's largest value. All arithmetic is FP32. Rows are worked on in blocks, none looks at another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fourge.nvfp4 import e4m3

_BLOCK_VALUES = 256 << 10


@dataclass(frozen=True)
class Fp8Weight:
    """A weight `[N, K]` in FP8, tensors as they stand in the file: ŵ = codes · scale.

    `codes` float8_e4m3fn `[N, K]`, `scale` `[N, 1]` in the dtype of the weight that it was made from.
    """

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.codes.shape[0], self.codes.shape[1]


def quantize_rows(weight: Tensor) -> Fp8Weight:
    """Rounds `weight` `[N, K]`, any float dtype, to the nearest under each row's max-calibrated scale.

    The scale is rounded to the weight's dtype first, as compressed-tensors stores it, and the codes are the nearest
    under what is stored. A row of zeros gets that dtype's epsilon for a scale, as there.
    """
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    scale = (torch.maximum(-low, high).float() / e4m3.MAX).to(weight.dtype)
    scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(weight.dtype).eps), scale)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for rows in _row_blocks(weight):
        codes[rows] = e4m3.encode(weight[rows].float() / scale[rows].float())
    return Fp8Weight(codes, scale)


def dequantize_rows(weight: Fp8Weight, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
    """`codes · scale` for `rows` of a weight, `[n, K]`: computed in FP32, then cast to `dtype`."""
    return (e4m3.decode(weight.codes[rows]) * weight.scale[rows].float()).to(dtype)


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Activations `[…, K]` as an engine's FP8 kernel sees them: one scale a token, in `x`'s dtype."""
    flat = x.reshape(-1, x.shape[-1])
    result = torch.empty_like(flat)
    for rows in _row_blocks(flat):
        values = flat[rows].float()
        scale = values.abs().amax(1, keepdim=True) / e4m3.MAX
        scale.masked_fill_(scale == 0, 1.0)  # a token of zeros: any scale gives zeros
        result[rows] = e4m3.round(values / scale) * scale
    return result.view(x.shape)


def squared_row_errors(weight: Tensor, quantized: Fp8Weight) -> tuple[Tensor, Tensor]:
    """Σ (ŵ − w)² and Σ w² over each row of `weight` `[N, K]`, any float dtype, both FP32 `[N]`."""
    errors, norms = (torch.empty(weight.shape[0], device=weight.device) for _ in range(2))
    for rows in _row_blocks(weight):
        source = weight[rows].float()
        errors[rows] = dequantize_rows(quantized, rows).sub_(source).square_().sum(1)
        norms[rows] = source.square_().sum(1)
    return errors, norms


def _row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of `x` `[N, K]`; on a GPU larger ones, for there a block is a kernel launch."""
    values = _BLOCK_VALUES if x.device.type == "cpu" else _BLOCK_VALUES << 8
    step = max(1, values // x.shape[1])
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))
