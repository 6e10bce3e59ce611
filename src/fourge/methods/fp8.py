"""FP8 with a scale a row, for groups that a recipe file gives that scheme: nothing to calibrate, nothing to choose."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fourge.methods.base import RoundRows
from fourge.methods.observe import InputStatistics
from fourge.nvfp4.fp8 import quantize_rows


class Fp8Rows:
    """Max calibration, row by row: see `fourge.nvfp4.fp8`."""

    weighs_channels = False
    needs_hessian = False
    compensates = False

    def prepare_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, events: list[dict[str, Any]]
    ) -> RoundRows:
        """See `Method.prepare_group`; the members share nothing, and `statistics` are not looked at."""
        return quantize_rows
