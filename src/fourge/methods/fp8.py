"""FP8 with a scale a row, for groups that a recipe file gives that scheme: nothing to calibrate, nothing to choose."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fourge.methods.observe import InputStatistics
from fourge.nvfp4.fp8 import Fp8Weight, quantize_rows


class Fp8Rows:
    """Max calibration, row by row: see `fourge.nvfp4.fp8`."""

    weighs_channels = False
    needs_hessian = False
    compensates = False

    def quantize_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, events: list[dict[str, Any]]
    ) -> dict[str, Fp8Weight]:
        """See `Method.quantize_group`; the members share nothing, and `statistics` are not looked at."""
        return {name: quantize_rows(weight) for name, weight in weights.items()}
