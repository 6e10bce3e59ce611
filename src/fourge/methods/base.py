"""What every method gets and gives."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from fourge.methods.observe import InputStatistics
from fourge.nvfp4.fp8 import Fp8Weight
from fourge.nvfp4.quantize import QuantizedWeight

RoundRows = Callable[[Tensor], QuantizedWeight | Fp8Weight]
"""Quantizes some rows `[n, K]` of a group's weights. No row looks at another, so they may be worked on anywhere."""


class Method(Protocol):
    """Quantizes the weights of one group of Linears that share an input.

    `weighs_channels`: wants `InputStatistics.importance` where there is data. `needs_hessian`: cannot do without
    `InputStatistics.hessian`, and so needs data, and calibration sequences in the quantized lane. `compensates`: wants
    weights that make up for what the quantized lane's inputs lack, and so a Hessian, and validation text to decide.
    """

    weighs_channels: bool
    needs_hessian: bool
    compensates: bool

    def prepare_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, events: list[dict[str, Any]]
    ) -> RoundRows:
        """Settles what the members have in common, in NVFP4 one global scale; what comes back quantizes their rows.

        `weights`: name → `[N, K]` in the source's dtype; `statistics`: the shared input's, None without data. Anything
        out of the ordinary (a fallback, a degenerate input) is appended to `events`.
        """
        ...
