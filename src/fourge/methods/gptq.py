"""GPTQ (Frantar et al., arXiv 2210.17323) under group scales given beforehand.

Minimised is ‖X (w − ŵ)‖² + λ‖w − ŵ‖² for each row w: columns are rounded left to right, and every column takes up
the error of those before it as far as the inputs correlate (`fourge.methods.hessian`).
"""

import torch
from torch import Tensor

from fourge.methods.hessian import Curvature
from fourge.methods.packing import pack_values
from fourge.methods.sweep import group_steps, row_chunks, sweep
from fourge.nvfp4 import e2m1
from fourge.nvfp4.quantize import GROUP_SIZE, QuantizedWeight


def gptq(
    weight: Tensor, scales: Tensor, global_scale: Tensor, curvature: Curvature, block_size: int = 16
) -> QuantizedWeight:
    """Rounds `weight` `[N, K]` under `scales` `[N, K/16]` (E4M3 grid) and the divisor `global_scale`, one value.

    Computed in the dtype of `curvature`. `block_size` columns are fed back one by one before a matrix product
    takes over: it changes the order of sums and nothing else.
    """
    values = torch.empty_like(weight, dtype=curvature.cost.dtype)
    for rows in row_chunks(weight):
        values[rows] = _round(weight[rows].to(values), scales[rows].to(values), global_scale, curvature, block_size).T
    return pack_values(values, scales, global_scale)


def _round(weight: Tensor, scales: Tensor, global_scale: Tensor, curvature: Curvature, block_size: int) -> Tensor:
    """E2M1 values, transposed: `[K, N]`."""
    steps = group_steps(scales, global_scale)
    work = weight.T.contiguous()
    values = torch.empty_like(work)

    def commit(columns: slice, block: Tensor) -> None:
        original = weight[:, columns].T.contiguous()
        feedback = curvature.feedback[columns, columns].T.contiguous()
        for j, column in enumerate(range(columns.start, columns.stop)):
            step = steps[column // GROUP_SIZE]
            target = torch.addmv(block[j], block[:j].T, feedback[j, :j])
            value = torch.div(target, step, out=target)
            values[column] = e2m1.round(value)
            torch.addcmul(original[j], values[column], step, value=-1, out=block[j])

    sweep(work, curvature.feedback, block_size, commit)
    return values
