"""Max calibration, the recipe of the published Hermes-4-405B-NVFP4 card.

The global scale maps the group's largest magnitude to 448 · 6, each group scale maps its 16 values' largest
magnitude to 6, and every weight is rounded to the nearest: no calibration data enters.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fourge.methods.base import RoundRows
from fourge.methods.observe import InputStatistics
from fourge.nvfp4.quantize import amax, global_scale, quantize_weight


def shared_global_scale(weights: Mapping[str, Tensor], events: list[dict[str, Any]]) -> Tensor:
    """The divisor of a group's weights, FP32 `[]`: 448 · 6 over the largest magnitude among all members."""
    largest = torch.stack([amax(weight) for weight in weights.values()]).max()
    if largest == 0:
        events.append({"event": "all weights are zero", "linears": list(weights)})
    return global_scale(largest)


class Max:
    """See the head of this file."""

    weighs_channels = False
    needs_hessian = False
    compensates = False

    def prepare_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, events: list[dict[str, Any]]
    ) -> RoundRows:
        """See `Method.prepare_group`; `statistics` are not looked at."""
        scale = shared_global_scale(weights, events)
        return lambda rows: quantize_weight(rows, scale)
