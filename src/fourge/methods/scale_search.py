"""The best E4M3 scale of every group for rounding to the nearest, by trial.

Minimised is Σ_j h_j (w_j − ŵ_j)² over a group's 16 values, h = diag(XᵀX) of the calibration's inputs (H-Scale, arXiv
2608.28113) or ones without data. The result is the optimum over all 126 positive E4M3 scales, found with about 13:
upwards, twice a scale at which nothing saturates only rounds to a subset of its values, so seven codes suffice;
downwards, what saturates grows with every code, so a group is done once that alone costs more than its best so far.
(How far down that is depends on h: a large weight on a channel that hardly speaks is better clipped.)
"""

import torch
from torch import Tensor

from fourge.methods.scale_codes import SMALLEST_CODE, positive_codes, positive_scales
from fourge.nvfp4 import e2m1
from fourge.nvfp4.backend import fused_loops
from fourge.nvfp4.quantize import GROUP_SIZE, group_scales, sum_pairs
from fourge.nvfp4.reference import E2M1_MAX

_CODES_UP = 7
_CODES_DOWN = 4  # for every group; further down only those that may still gain
_FIRST_NORMAL_CODE = 8  # from here on, twice a scale is eight codes up
_OFFSETS = sorted(range(-_CODES_DOWN, _CODES_UP + 1), key=abs)
_CPU_VALUES_PER_CHUNK = 2**18  # the temporaries stay in the cache
_FUSED_VALUES_PER_CHUNK = 2**25  # on a GPU too


def search_scales(weight: Tensor, global_scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scales `[N, K/16]`, FP32 on E4M3's grid, of `weight` `[N, K]`, any float dtype, under the divisor `global_scale`.

    `importance` `[K]` is h, not negative. The max scale is tried first, the others by their distance from it, and the
    first of equals stays: so no group is worse than with max.
    """
    h = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    fused = fused_loops(weight.device, torch.float32)
    torch_on_cpu = fused is None and weight.device.type == "cpu"
    values = _CPU_VALUES_PER_CHUNK if torch_on_cpu else _FUSED_VALUES_PER_CHUNK
    step = max(1, values // weight.shape[1])
    found = []
    for block in torch.split(weight, step):
        if fused is not None:
            found.append(fused.search(block, global_scale, h, _OFFSETS))
        else:
            groups = block.float().view(-1, weight.shape[1] // GROUP_SIZE, GROUP_SIZE)
            found.append(_search(groups, global_scale, h.view(-1, GROUP_SIZE)))
    # A copy of the only one would call torch's threads, which wait for more by spinning.
    return found[0] if len(found) == 1 else torch.cat(found)


def _search(groups: Tensor, global_scale: Tensor, h: Tensor) -> Tensor:
    """Scales `[n, G]` of `groups` `[n, G, 16]` with h `[G, 16]`."""
    best, least, start = _try_around(groups, global_scale, h)
    every_h = h.repeat(groups.shape[0], 1)
    _walk_down(
        groups.flatten(0, 1), every_h, global_scale, start.flatten() - _CODES_DOWN, best.view(-1), least.view(-1)
    )
    return best


def _try_around(groups: Tensor, global_scale: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best scales, their errors and the codes the trial was around, `[n, G]`.

    That is the max scale's code, or the first normal one where that is larger: among subnormal scales the way to
    twice a scale can be longer than seven codes, and from there it is not.
    """

    def error(scales: Tensor) -> Tensor:
        return sum_pairs(_residuals(groups, scales / global_scale).square_().mul_(h))

    best = group_scales(groups.flatten(-2), global_scale)
    least = error(best)
    start = positive_codes(best).clamp_min(_FIRST_NORMAL_CODE)
    for offset in _OFFSETS:
        scales = positive_scales(start + offset)
        errors = error(scales)
        best = torch.where(errors < least, scales, best)
        least = torch.minimum(errors, least)
    return best, least, start


def _walk_down(groups: Tensor, h: Tensor, global_scale: Tensor, codes: Tensor, best: Tensor, least: Tensor) -> None:
    """Tries the scales below `codes` `[m]` as long as they may gain; updates `best` and `least` `[m]`.

    `groups` and `h` `[m, 16]`.
    """
    alive = torch.arange(len(groups), device=groups.device)
    while len(alive):
        codes = codes - 1
        steps = positive_scales(codes) / global_scale
        clipped = (groups.abs() - E2M1_MAX * steps.unsqueeze(-1)).clamp_min_(0).square_().mul_(h)
        clipped = sum_pairs(clipped)
        may_gain = (clipped < least[alive]) & (codes >= SMALLEST_CODE)
        alive, groups, h, codes, steps = (t[may_gain] for t in (alive, groups, h, codes, steps))
        errors = sum_pairs(_residuals(groups, steps).square_().mul_(h))
        better = errors < least[alive]
        best[alive[better]] = positive_scales(codes[better])
        least[alive[better]] = errors[better]


def _residuals(groups: Tensor, steps: Tensor) -> Tensor:
    """ŵ − w of `groups` `[…, 16]`, rounded to the nearest under `steps` `[…]`."""
    steps = steps.unsqueeze(-1)
    return e2m1.round(groups / steps).mul_(steps).sub_(groups)
