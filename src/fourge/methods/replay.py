"""Schur replay: GPTQ that chooses every group's scale at its turn ("Replay the Curvature", 2026).

When the walk reaches a group, a miss of its 16 columns costs (w₀ − q)ᵀ S (w₀ − q) once the columns after it have made
up for what they can; w₀ is the best real-valued choice given the columns before, S = (U_GGᵀ U_GG)⁻¹ of GPTQ's U. In
terms of the factor H + λI = F diag(cost) Fᵀ that is Σ_j cost_j (v_j − q_j)² over the group, v_j being the very
values that GPTQ rounds. So each candidate scale is scored by replaying GPTQ within the group, and the sum of all
groups' scores is the error of the whole row: nothing is approximated but the future.
"""

import torch
from torch import Tensor

from fourge.methods.hessian import Curvature
from fourge.methods.scale_codes import positive_codes, positive_scales
from fourge.methods.sweep import chunks_in_walk_order, nearest, quantized, sweep
from fourge.nvfp4 import e2m1
from fourge.nvfp4.backend import fused_loops
from fourge.nvfp4.quantize import GROUP_SIZE, QuantizedWeight

_ALTERNATING_STEPS = 3


def replay(
    weight: Tensor, scales: Tensor, global_scale: Tensor, curvature: Curvature, window: int = 4
) -> QuantizedWeight:
    """Rounds `weight` `[N, K]`, any float dtype, under scales of its own choice.

    `scales` `[N, K/16]` on E4M3's positive grid: where each group's proposal starts, and its first candidate, which
    wins ties; the others are the E4M3 values within `window` codes of the proposal. `global_scale`, `[]` or `[1]`,
    is the divisor. Computed in the dtype and on the device of `curvature`; the result lies there.
    """
    chunks = (
        _replay(weight_kn, scales_gn, global_scale.to(scales_gn), curvature, window)
        for weight_kn, scales_gn in chunks_in_walk_order(weight, scales, curvature)
    )
    return quantized(chunks, global_scale, curvature)


def _replay(
    weight_kn: Tensor, scales_gn: Tensor, global_scale: Tensor, curvature: Curvature, window: int
) -> tuple[Tensor, Tensor]:
    """E2M1 codes, uint8 `[K, n]`, and scales `[K/16, n]`."""
    codes_kn = torch.empty_like(weight_kn, dtype=torch.uint8)
    chosen_gn = torch.empty_like(scales_gn)
    fused = fused_loops(weight_kn.device, weight_kn.dtype)
    replay_group = _replay_group if fused is None else fused.replay_group
    for group, (columns, fed) in enumerate(sweep(weight_kn.shape[1], curvature, GROUP_SIZE)):
        feedback, cost = curvature.feedback[columns, columns], curvature.cost[columns]
        arguments = scales_gn[group], global_scale, window, _ALTERNATING_STEPS, codes_kn[columns], chosen_gn[group]
        replay_group(weight_kn[columns], fed, feedback, cost, *arguments)
    return codes_kn, chosen_gn


def _replay_group(
    weight: Tensor,
    fed: Tensor,
    feedback: Tensor,
    cost: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    window: int,
    alternating: int,
    codes: Tensor,
    chosen: Tensor,
) -> None:
    """A group's turn: writes E2M1 `codes`, uint8 `[16, n]`, the `chosen` scales `[n]`, and w − q over `fed`.

    `weight` and `fed` `[16, n]`; `feedback` F `[16, 16]` and `cost` `[16]` of the group's own columns; `scales` `[n]`;
    `alternating` steps lead to the proposal. Every sum goes column after column, and every product and sum is rounded:
    so the fused loops give the same bits.
    """
    steps = _proposal(weight, fed, feedback, cost, scales / global_scale, alternating)
    candidates = torch.cat((scales[None], _around(steps * global_scale, window)))
    values, scores = _try(weight, fed, feedback, cost, candidates / global_scale)
    best, least = torch.zeros_like(scales, dtype=torch.int64), scores[0]
    for candidate in range(1, len(candidates)):  # not argmin: it need not be the first of equals on a GPU
        best.masked_fill_(scores[candidate] < least, candidate)
        least = torch.minimum(scores[candidate], least)
    chosen.copy_(candidates.gather(0, best[None])[0])
    values = values.gather(1, best.expand(GROUP_SIZE, 1, -1))[:, 0]
    codes.copy_(e2m1.encode(values.float()))
    torch.sub(weight, values * (chosen / global_scale), out=fed)


def _proposal(weight: Tensor, fed: Tensor, feedback: Tensor, cost: Tensor, steps: Tensor, alternating: int) -> Tensor:
    """The real-valued step `[n]` that fits the group best under S, by turns with the rounding, from `steps` `[n]`.

    S = F diag(cost) Fᵀ, and Fᵀ w₀ = fed + Fᵀ w, for w₀ is the choice that would leave no v_j − q_j.
    """
    goal = _add_forward(fed, feedback, weight)
    free = goal.clone()
    for i in range(GROUP_SIZE):
        free[i + 1 :] -= feedback[i, i + 1 :, None] * free[i]
    for _ in range(alternating):
        rounded = _add_forward(torch.zeros_like(fed), feedback, nearest(free / steps))
        weighted = rounded * cost[:, None]
        along = _sum_columns(weighted * goal)
        steps = torch.where(along > 0, along / _sum_columns(weighted * rounded), steps)
    return steps


def _add_forward(start: Tensor, feedback: Tensor, x: Tensor) -> Tensor:
    """`start` + Fᵀ `x`, both `[16, n]`."""
    total = start.clone()
    for i in range(GROUP_SIZE):
        total[i:] += feedback[i, i:, None] * x[i]
    return total


def _around(scales: Tensor, window: int) -> Tensor:
    """The E4M3 values within `window` codes of `scales` `[n]`, `[2·window + 1, n]`."""
    offsets = torch.arange(-window, window + 1, dtype=torch.int32, device=scales.device)
    return positive_scales(positive_codes(scales) + offsets[:, None]).to(scales.dtype)


def _try(weight: Tensor, fed: Tensor, feedback: Tensor, cost: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Replays GPTQ over a group's columns for each of `steps` `[C, n]`: E2M1 values `[16, C, n]`, scores `[C, n]`."""
    targets = (fed + weight)[:, None].repeat(1, len(steps), 1)
    values = torch.empty_like(targets)
    for j in range(GROUP_SIZE):
        values[j] = nearest(targets[j] / steps)
        targets[j + 1 :] += feedback[j, j + 1 :, None, None] * (weight[j] - values[j] * steps)
    short = targets.sub_(values * steps)
    return values, _sum_columns(short.square_().mul_(cost[:, None, None]))


def _sum_columns(x: Tensor) -> Tensor:
    """The sum along the first dimension, one after the other."""
    total = torch.zeros_like(x[0])
    for row in x:
        total += row
    return total
