"""The walk over a weight's columns that GPTQ and replay share: who comes when, and what is fed forward.

Within the walk everything lies transposed (a column's values of all rows side by side) and in walk order. Shapes:
K columns, G = K/16 groups, n rows of a chunk.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fourge.methods.hessian import Curvature
from fourge.nvfp4 import e2m1, e4m3
from fourge.nvfp4.quantize import GROUP_SIZE, QuantizedWeight

VALUES_PER_CHUNK = {"cpu": 2**25, "cuda": 2**28}
"""Rows are independent; all at once, a wide weight would be held several times over. On a GPU a turn is a launch."""

_ALIGNED_ROWS = 64
"""A GPU is quickest, and compiles once, where every column begins at such a multiple."""


def rows_per_chunk(device: torch.device, columns: int) -> int:
    """Of a weight with so many `columns`, worked on at once."""
    rows = max(1, VALUES_PER_CHUNK[device.type] // columns)
    return max(rows, _ALIGNED_ROWS) // _ALIGNED_ROWS * _ALIGNED_ROWS if device.type == "cuda" else rows


def chunks_in_walk_order(weight: Tensor, scales: Tensor, curvature: Curvature) -> Iterator[tuple[Tensor, Tensor]]:
    """`weight` `[N, K]` and `scales` `[N, G]` by chunks of rows, `[K, n]` and `[G, n]`.

    They come in the dtype and on the device of `curvature`.
    """
    columns, groups = curvature.order, _group_order(curvature)
    rows = rows_per_chunk(curvature.cost.device, weight.shape[1])
    for weight_nk, scales_ng in zip(torch.split(weight, rows), torch.split(scales, rows), strict=True):
        yield (
            weight_nk.to(curvature.cost)[:, columns].T.contiguous(),
            scales_ng.to(curvature.cost)[:, groups].T.contiguous(),
        )


def sweep(rows: int, curvature: Curvature, block_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Goes over the columns in blocks of `block_size`: `(columns, fed)`, `fed` `[block_size, rows]`.

    `fed` arrives as Σ F_ij (w_i − q_i) over all columns i before the block; the caller leaves the block's own w − q
    there. Halving recurs down to the blocks, so that nearly all of the arithmetic is in large matrix products.
    """
    columns = curvature.feedback.shape[0]
    work = curvature.feedback.new_zeros(columns, rows)
    return _descend(curvature.feedback, work, slice(0, columns), block_size)


def _descend(feedback: Tensor, work: Tensor, columns: slice, block_size: int) -> Iterator[tuple[slice, Tensor]]:
    blocks = -(-(columns.stop - columns.start) // block_size)
    if blocks == 1:
        yield columns, work[columns]
        return
    middle = columns.start + blocks // 2 * block_size
    before, after = slice(columns.start, middle), slice(middle, columns.stop)
    yield from _descend(feedback, work, before, block_size)
    work[after].addmm_(feedback[before, after].T, work[before])
    yield from _descend(feedback, work, after, block_size)


def quantized(chunks: Iterable[tuple[Tensor, Tensor]], global_scale: Tensor, curvature: Curvature) -> QuantizedWeight:
    """The weight of `chunks` of E2M1 codes, uint8 `[K, n]`, and scales `[G, n]`, both in walk order."""
    columns, groups = curvature.order.argsort(), _group_order(curvature).argsort()
    packed, scales = [], []
    for codes_kn, scales_gn in chunks:
        packed.append(e2m1.pack(codes_kn[columns].T).contiguous())
        scales.append(e4m3.encode(scales_gn[groups].T.contiguous()))
    return QuantizedWeight(torch.cat(packed), torch.cat(scales), global_scale.float().reshape(1))


def nearest(x: Tensor) -> Tensor:
    """The nearest E2M1 values in `x`'s dtype, FP32 or FP64."""
    return e2m1.round(x.float()).to(x.dtype)


def _group_order(curvature: Curvature) -> Tensor:
    return curvature.order[::GROUP_SIZE] // GROUP_SIZE
