"""GPTQ (Frantar et al., arXiv 2210.17323) under group scales given beforehand.

Minimised is ‖X (w − ŵ)‖² + λ‖w − ŵ‖² for each row w: one column after the other is rounded, and takes up the misses
of those before it as far as the inputs correlate (`fourge.methods.hessian`).
"""

import torch
from torch import Tensor

from fourge.methods.hessian import Curvature
from fourge.methods.sweep import chunks_in_walk_order, nearest, quantized, sweep
from fourge.nvfp4 import e2m1
from fourge.nvfp4.quantize import GROUP_SIZE, QuantizedWeight


def gptq(
    weight: Tensor, scales: Tensor, global_scale: Tensor, curvature: Curvature, block_size: int = 16
) -> QuantizedWeight:
    """Rounds `weight` `[N, K]`, any float dtype, under `scales` `[N, K/16]` on E4M3's positive grid.

    `global_scale`, `[]` or `[1]`, is the divisor. Computed in the dtype and on the device of `curvature`; the
    result lies there. `block_size` columns are fed forward one by one before matrix products take over: it decides
    the order of sums and nothing else.
    """
    chunks = (
        (_round(weight_kn, scales_gn / global_scale.to(scales_gn), curvature, block_size), scales_gn)
        for weight_kn, scales_gn in chunks_in_walk_order(weight, scales, curvature)
    )
    return quantized(chunks, global_scale, curvature)


def _round(weight_kn: Tensor, steps_gn: Tensor, curvature: Curvature, block_size: int) -> Tensor:
    """E2M1 codes, uint8 `[K, n]`."""
    codes_kn = torch.empty_like(weight_kn, dtype=torch.uint8)
    for columns, fed in sweep(weight_kn.shape[1], curvature, block_size):
        feedback = curvature.feedback[columns, columns].T.contiguous()
        values = torch.empty_like(fed)
        for j in range(len(fed)):
            column = columns.start + j
            step = steps_gn[column // GROUP_SIZE]
            # The rows of `fed` before j hold w − q by now.
            target = torch.addmv(fed[j], fed[:j].T, feedback[j, :j]).add_(weight_kn[column])
            values[j] = nearest(target.div_(step))
            torch.addcmul(weight_kn[column], values[j], step, value=-1, out=fed[j])
        codes_kn[columns] = e2m1.encode(values.float())
    return codes_kn
