"""Max calibration's global scale with the best group scales: every weight rounded to the nearest under them.

The best scale of a group is the one that errs least, channels weighed by how much they speak (`scale_search.py`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fourge.methods.base import RoundRows
from fourge.methods.max import shared_global_scale
from fourge.methods.observe import InputStatistics
from fourge.methods.scale_search import search_scales
from fourge.nvfp4.quantize import quantize_weight


class Search:
    """See the head of this file. Without data all channels weigh the same."""

    weighs_channels = True
    needs_hessian = False
    compensates = False

    def prepare_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, events: list[dict[str, Any]]
    ) -> RoundRows:
        """See `Method.prepare_group`."""
        importance = None if statistics is None else statistics.importance
        scale = shared_global_scale(weights, events)
        return lambda rows: quantize_weight(rows, scale, search_scales(rows, scale, importance))
