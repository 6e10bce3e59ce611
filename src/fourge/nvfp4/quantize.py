"""Weights to NVFP4 and back, and activations as engines quantize them at run time.

All arithmetic is FP32, in the order of compressed-tensors, so that bytes can be compared. Rows are worked on in
blocks that fit the cache; no row looks at another, so blocks change nothing in the result. Where fused loops are
installed (`backend.py`) they do the same, faster, to the bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fourge.nvfp4 import e2m1, e4m3
from fourge.nvfp4.backend import fused_loops
from fourge.nvfp4.reference import E2M1_MAX, GLOBAL_RANGE, ZERO_SCALE

GROUP_SIZE = 16

_BLOCK_VALUES = 256 << 10
"""Values a block: the best of 16 k … 4 M on CPUs, where it keeps the temporaries in the cache."""

_MAGNITUDE_BITS = 0x7FFFFFFF


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[N, K]` in NVFP4, tensors as they stand in the file.

    `packed` uint8 `[N, K/2]`, `scale` float8_e4m3fn `[N, K/16]`, `global_scale` FP32 `[1]`, a divisor.
    """

    packed: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.packed.shape[0], 2 * self.packed.shape[1]


def amax(x: Tensor) -> Tensor:
    """The largest magnitude in `x`, FP32 `[]`, without a copy of `x`; NaN where there is one."""
    fused = fused_loops(x.device, x.dtype)
    if fused is not None and x.is_contiguous() and x.numel() and x.numel() % GROUP_SIZE == 0:
        return fused.amax(x)
    return torch.stack(torch.aminmax(x)).abs().max().float()


def global_scale(amax: Tensor) -> Tensor:
    """The divisor `448 · 6 / amax`, FP32 in the shape of `amax`; 1.0 where that overflows (see the reference)."""
    scale = GLOBAL_RANGE * amax.float().clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    return torch.where(scale.isinf(), torch.ones_like(scale), scale)


def group_scales(x: Tensor, global_scale: Tensor) -> Tensor:
    """Max-calibrated scales of the groups of FP32 `x` `[…, K]`: FP32 `[…, K/16]` on E4M3's grid, never zero."""
    assert x.dtype == torch.float32
    magnitudes = x.view(torch.int32) & _MAGNITUDE_BITS  # ordered as the numbers are, and a faster maximum on CPUs
    largest = _groups(magnitudes).amax(-1).view(torch.float32)
    scales = e4m3.round(global_scale * (largest / E2M1_MAX))
    return scales.masked_fill_(scales == 0, ZERO_SCALE)


def quantize_weight(weight: Tensor, global_scale: Tensor, scales: Tensor | None = None) -> QuantizedWeight:
    """Rounds `weight` `[N, K]`, any float dtype, to the nearest under `global_scale`, FP32 `[]` or `[1]`.

    `scales` `[N, K/16]` are values on E4M3's positive grid; None takes the max-calibrated ones.
    """
    rows, columns = weight.shape
    fused = fused_loops(weight.device, weight.dtype)
    if fused is not None:
        return QuantizedWeight(*fused.encode(weight, global_scale, scales), global_scale.reshape(1))
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    for block in _row_blocks(rows, columns, weight.device):
        values = weight[block].float()
        chosen = group_scales(values, global_scale) if scales is None else scales[block].float()
        scaled = _groups(values) / (chosen / global_scale).unsqueeze(-1)
        scaled += 0.0  # −0.0 becomes 0.0, as `e2m1.round` has it; nothing else changes
        packed[block] = e2m1.pack(e2m1.encode(scaled).flatten(-2))
        scale[block] = e4m3.encode(chosen)
    return QuantizedWeight(packed, scale, global_scale.reshape(1))


def dequantize_weight(weight: QuantizedWeight, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
    """`e2m1 · (scale / global_scale)` for `rows` of a weight, `[n, K]`: computed in FP32, then cast to `dtype`."""
    packed, scale = weight.packed[rows], weight.scale[rows]
    fused = fused_loops(packed.device, dtype)
    if fused is not None:
        return fused.decode(packed, scale, weight.global_scale, dtype)
    count, columns = packed.shape[0], 2 * packed.shape[1]
    table = e2m1.byte_values(packed.device).view(torch.int64).flatten()  # a pair of FP32 values moves as one number
    result = torch.empty(count, columns, dtype=dtype, device=packed.device)
    for block in _row_blocks(count, columns, packed.device):
        pairs = table.index_select(0, packed[block].flatten().int())
        values = pairs.view(torch.float32).view(-1, columns // GROUP_SIZE, GROUP_SIZE)
        values *= (e4m3.decode(scale[block]) / weight.global_scale).unsqueeze(-1)
        result[block] = values.flatten(-2)
    return result


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """Activations `[…, K]` as an engine's W4A4 kernel sees them: quantized per token and group of 16, in `x`'s dtype.

    `global_scale` is the input's divisor, FP32 `[]` or `[1]`. Values beyond its range saturate.
    """
    flat = x.reshape(-1, x.shape[-1])
    fused = fused_loops(x.device, x.dtype)
    if fused is not None:
        return fused.fake_quantize(flat, global_scale).view(x.shape)
    result = torch.empty_like(flat)
    for block in _row_blocks(flat.shape[0], flat.shape[1], flat.device):
        values = flat[block].float()
        scales = (group_scales(values, global_scale) / global_scale).unsqueeze(-1)
        rounded = e2m1.round(_groups(values) / scales)
        result[block] = rounded.mul_(scales).flatten(-2)
    return result.view(x.shape)


def squared_errors(weight: Tensor, quantized: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Σ (ŵ − w)² and Σ w² over each group of `weight` `[N, K]`, any float dtype, both FP32 `[N, K/16]`."""
    fused = fused_loops(weight.device, weight.dtype)
    if fused is not None:
        return fused.squared_errors(weight, quantized.packed, quantized.scale, quantized.global_scale)
    errors, norms = (torch.empty(quantized.scale.shape, device=weight.device) for _ in range(2))
    for block in _row_blocks(*quantized.shape, weight.device):
        source = weight[block].float()
        difference = dequantize_weight(quantized, block).sub_(source)
        errors[block] = sum_pairs(_groups(difference.square_()))
        norms[block] = sum_pairs(_groups(source.square()))
    return errors, norms


def sum_pairs(x: Tensor) -> Tensor:
    """Sums along the last dimension, a power of two: of pairs, of pairs of pairs, and so on; the same on any device."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def _groups(x: Tensor) -> Tensor:
    """`[…, K]` as `[…, K/16, 16]`."""
    return x.reshape(*x.shape[:-1], -1, GROUP_SIZE)


def _row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `rows`; on a GPU larger ones, for there a block is a kernel launch."""
    values = _BLOCK_VALUES if device.type == "cpu" else _BLOCK_VALUES << 8
    step = max(1, values // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
