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
    costs = curvature.cost.tolist()
    for group, (columns, fed) in enumerate(sweep(weight_kn.shape[1], curvature, GROUP_SIZE)):
        feedback = curvature.feedback[columns, columns].T.contiguous()
        weight = weight_kn[columns]
        steps = _proposal(weight, fed, feedback, curvature.cost[columns], scales_gn[group] / global_scale)
        candidates = torch.cat((scales_gn[group, None], _around(steps * global_scale, window)))
        values, misses, scores = _try(weight, fed, feedback, costs[columns], candidates / global_scale)
        best = scores.argmin(0, keepdim=True)  # the first of equals
        everywhere = best.expand(GROUP_SIZE, 1, -1)
        codes_kn[columns] = e2m1.encode(values.gather(1, everywhere)[:, 0].float())
        chosen_gn[group] = candidates.gather(0, best)[0]
        fed.copy_(misses.gather(1, everywhere)[:, 0])
    return codes_kn, chosen_gn


def _proposal(weight: Tensor, fed: Tensor, feedback: Tensor, cost: Tensor, steps: Tensor) -> Tensor:
    """The real-valued step `[n]` that fits the group best under S, by turns with the rounding, from `steps` `[n]`.

    `weight` and `fed` `[16, n]`, `feedback` Fᵀ and `cost` of the group's own columns. S = F diag(cost) Fᵀ, and
    Fᵀ w₀ = fed + Fᵀ w, for w₀ is the choice that would leave no v_j − q_j.
    """
    goal = torch.addmm(fed, feedback, weight)
    free = torch.linalg.solve_triangular(feedback, goal, upper=False, unitriangular=True)
    for _ in range(_ALTERNATING_STEPS):
        rounded = feedback @ nearest(free / steps)
        weighted = rounded * cost[:, None]
        along = (weighted * goal).sum(0)
        steps = torch.where(along > 0, along / (weighted * rounded).sum(0), steps)
    return steps


def _around(scales: Tensor, window: int) -> Tensor:
    """The E4M3 values within `window` codes of `scales` `[n]`, `[2·window + 1, n]`."""
    offsets = torch.arange(-window, window + 1, dtype=torch.int32, device=scales.device)
    return positive_scales(positive_codes(scales) + offsets[:, None]).to(scales.dtype)


def _try(
    weight: Tensor, fed: Tensor, feedback: Tensor, costs: list[float], steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Replays GPTQ over a group's columns for each of `steps` `[C, n]`.

    Returns E2M1 values and w − q, both `[16, C, n]`, and the scores `[C, n]`.
    """
    values = steps.new_empty(GROUP_SIZE, *steps.shape)
    misses = torch.empty_like(values)
    scores = torch.zeros_like(steps)
    for j, cost in enumerate(costs):
        before = misses[:j].view(j, steps.numel())
        target = torch.mv(before.T, feedback[j, :j]).view_as(steps).add_(fed[j] + weight[j])
        values[j] = nearest(target / steps)
        rounded = values[j] * steps
        torch.sub(weight[j], rounded, out=misses[j])
        short = target.sub_(rounded)
        scores.addcmul_(short, short, value=cost)
    return values, misses, scores
