"""How far a quantized weight is from its source: ‖Ŵ − W‖ / ‖W‖, the Frobenius norms summed in FP64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fourge.nvfp4.quantize import QuantizedWeight, dequantize_weight

_BLOCK_VALUES = 512 << 10


class RelativeError:
    """Running sums of one weight's error over blocks of its rows."""

    def __init__(self) -> None:
        self._difference = torch.zeros((), dtype=torch.float64)
        self._norm = torch.zeros((), dtype=torch.float64)

    def add(self, source: Tensor, quantized: Tensor) -> None:
        """Takes a block: rows of W and of Ŵ, both FP32 `[n, K]`."""
        self._difference += (quantized - source).square().sum(dtype=torch.float64).cpu()
        self._norm += source.square().sum(dtype=torch.float64).cpu()

    @property
    def value(self) -> float:
        """‖Ŵ − W‖ / ‖W‖; where W is all zero, 0 if Ŵ is too, else infinity."""
        if self._norm == 0:
            return 0.0 if self._difference == 0 else float("inf")
        return float((self._difference / self._norm).sqrt())


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that cover a weight of `shape` `[N, K]`, each of about half a million values."""
    step = max(1, _BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def relative_weight_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """‖Ŵ − W‖ / ‖W‖ for `weight` `[N, K]`."""
    error = RelativeError()
    for rows in row_blocks(tuple(weight.shape)):
        error.add(weight[rows].float(), dequantize_weight(quantized, rows))
    return error.value
