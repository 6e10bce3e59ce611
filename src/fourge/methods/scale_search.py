"""The best E4M3 scale of every group for rounding to the nearest, by trial.

Minimised is Σ_j h_j (w_j − ŵ_j)² over a group's 16 values, h = diag(XᵀX) of the calibration's inputs (H-Scale, arXiv
2608.28113) or ones without data. The result is the optimum over all 126 positive E4M3 scales, found with about 15:
upwards, a scale that is twice another and at which nothing saturates rounds to a subset of the other's values, so
seven codes suffice; downwards, what saturates grows with every code, so the walk ends once that alone costs more
than the best so far. (Channels of unequal h may well prefer to saturate a weight that hardly counts.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fourge.nvfp4 import e2m1, e4m3
from fourge.nvfp4.quantize import GROUP_SIZE, group_scales

E2M1_MAX = 6.0
LARGEST_CODE = 126

_CODES_UP = 7
_CODES_DOWN = 4  # tried on every group; below, only on those that may still gain
_FIRST_NORMAL_CODE = 8  # from here on, twice a scale is a scale
_BLOCK_WINDOW = (-8, 7)
_VALUES_PER_CHUNK = {"cpu": 2**17, "cuda": 2**25}  # on a CPU what keeps the temporaries in its cache


def search_scales(
    weight: Tensor, global_scale: Tensor, importance: Tensor | None = None, blocks: Tensor | None = None
) -> Tensor:
    """Scales `[N, K/16]`, FP32 on E4M3's grid, for `weight` `[N, K]`, any float dtype, under the divisor `global_scale`.

    `importance` `[K]`: h, not negative. With `blocks` `[K/16, 16, 16]` instead, the diagonal blocks B of XᵀX, each
    group minimises (w − ŵ)ᵀ B (w − ŵ) over the codes −8 … +7 around its max scale. The max scale is tried first and
    wins ties, so no group is worse than with it.
    """
    assert importance is None or blocks is None
    scales = torch.empty(weight.shape[0], weight.shape[1] // GROUP_SIZE, device=weight.device)
    for rows in _row_chunks(weight):
        groups = weight[rows].float().unflatten(-1, (-1, GROUP_SIZE))
        if blocks is None:
            h = torch.ones_like(weight[0], dtype=torch.float32) if importance is None else importance.float()
            scales[rows] = _search_diagonal(groups, global_scale, h.view(-1, GROUP_SIZE))
        else:
            scales[rows] = _search_blocks(groups, global_scale, blocks.float())
    return scales


def positive_codes(scales: Tensor) -> Tensor:
    """The int32 codes, 1 … 126, of the nearest positive E4M3 values."""
    return e4m3.encode(scales.clamp_min(e4m3.MIN_POSITIVE)).view(torch.uint8).int()


def scales_of(codes: Tensor) -> Tensor:
    """The E4M3 values, FP32, of integer `codes`; what lies outside 1 … 126 becomes the nearest of these."""
    return e4m3.decode(codes.clamp(1, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn))


def _search_diagonal(groups: Tensor, global_scale: Tensor, h: Tensor) -> Tensor:
    """`groups` `[n, G, 16]`, `h` `[G, 16]` → scales `[n, G]`."""

    def error(scales: Tensor, groups: Tensor, h: Tensor) -> Tensor:
        return _residuals(groups, scales / global_scale).square_().mul_(h).sum(-1)

    best = group_scales(groups.flatten(-2), global_scale)
    least = error(best, groups, h)
    start = positive_codes(best).clamp_min_(_FIRST_NORMAL_CODE)
    for offset in _by_distance(-_CODES_DOWN, _CODES_UP):
        scales = scales_of(start + offset)
        _keep_better(best, least, scales, error(scales, groups, h))
    # From here on flat, and only over the groups that may still gain.
    alive = torch.arange(best.numel(), device=best.device)
    ...
    return best


def _search_blocks(groups: Tensor, global_scale: Tensor, blocks: Tensor) -> Tensor:
    """`groups` `[n, G, 16]`, `blocks` `[G, 16, 16]` → scales `[n, G]`."""

    def error(scales: Tensor) -> Tensor:
        residuals = _residuals(groups, scales / global_scale)
        return torch.einsum("ngi,gij,ngj->ng", residuals, blocks, residuals)

    best = group_scales(groups.flatten(-2), global_scale)
    least = error(best)
    start = positive_codes(best)
    for offset in _by_distance(*_BLOCK_WINDOW):
        scales = scales_of(start + offset)
        _keep_better(best, least, scales, error(scales))
    return best


def _residuals(groups: Tensor, steps: Tensor) -> Tensor:
    """ŵ − w, `[..., 16]`, for `groups` `[..., 16]` rounded to the nearest multiple of `steps` `[...]` on E2M1's grid."""
    steps = steps.unsqueeze(-1)
    return e2m1.round(groups / steps).mul_(steps).sub_(groups)
