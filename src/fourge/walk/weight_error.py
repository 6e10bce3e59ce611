"""How far a quantized weight is from its source: ‖Ŵ − W‖ / ‖W‖, the groups' or rows' squares summed in FP64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fourge.nvfp4.fp8 import Fp8Weight, squared_row_errors
from fourge.nvfp4.quantize import QuantizedWeight, squared_errors

_BLOCK_VALUES = 4 << 20


class RelativeError:
    """Running sums of one weight's error over blocks of its rows."""

    def __init__(self) -> None:
        self._difference = torch.zeros((), dtype=torch.float64)
        self._norm = torch.zeros((), dtype=torch.float64)

    def add(self, differences: Tensor, squares: Tensor) -> None:
        """Takes a block's Σ (ŵ − w)² and Σ w² by group or row, as `squared_errors` gives them."""
        self._difference += differences.sum(dtype=torch.float64).cpu()
        self._norm += squares.sum(dtype=torch.float64).cpu()

    @property
    def value(self) -> float:
        """‖Ŵ − W‖ / ‖W‖; where W is all zero, 0 if Ŵ is too, else infinity."""
        if self._norm == 0:
            return 0.0 if self._difference == 0 else float("inf")
        return float((self._difference / self._norm).sqrt())


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that cover a weight of `shape` `[N, K]`, each of about four million values."""
    step = max(1, _BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def relative_weight_error(weight: Tensor, quantized: QuantizedWeight | Fp8Weight) -> float:
    """‖Ŵ − W‖ / ‖W‖ for `weight` `[N, K]`."""
    error = RelativeError()
    if isinstance(quantized, Fp8Weight):
        error.add(*squared_row_errors(weight, quantized))
        return error.value
    for rows in row_blocks(tuple(weight.shape)):
        part = QuantizedWeight(quantized.packed[rows], quantized.scale[rows], quantized.global_scale)
        error.add(*squared_errors(weight[rows], part))
    return error.value
