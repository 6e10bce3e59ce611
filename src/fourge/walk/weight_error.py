"""How far a quantized weight is from its source: ‖Ŵ − W‖ / ‖W‖, the groups' or rows' squares summed in FP64."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fourge.nvfp4.fp8 import Fp8Weight, squared_row_errors
from fourge.nvfp4.quantize import QuantizedWeight, squared_errors

_BLOCK_VALUES = 4 << 20


class RelativeError:
    """Running sums of one weight's error over blocks of its rows."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    def add(self, differences: Tensor, squares: Tensor) -> None:
        """Takes a block's Σ (ŵ − w)² and Σ w² by group or row, as `squared_errors` gives them."""
        self.add_sums(_sums(differences, squares))

    def add_sums(self, sums: Tensor) -> None:
        """Takes a block's `squared_sums`."""
        self._sums += sums

    @property
    def value(self) -> float:
        """‖Ŵ − W‖ / ‖W‖; where W is all zero, 0 if Ŵ is too, else infinity."""
        difference, norm = self._sums
        if norm == 0:
            return 0.0 if difference == 0 else float("inf")
        return float((difference / norm).sqrt())


def squared_sums(weight: Tensor, quantized: QuantizedWeight | Fp8Weight) -> Tensor:
    """Σ (ŵ − w)² and Σ w² of `weight` `[N, K]`, FP64 `[2]` on the CPU."""
    if isinstance(quantized, Fp8Weight):
        return _sums(*squared_row_errors(weight, quantized))
    return _sums(*squared_errors(weight, quantized))


def _sums(differences: Tensor, squares: Tensor) -> Tensor:
    """FP64 `[2]` on the CPU; there by numpy, for the reason in `nvfp4/magnitude.py`."""
    if differences.device.type == "cpu":
        return torch.tensor([x.numpy().sum(dtype=np.float64) for x in (differences, squares)], dtype=torch.float64)
    return torch.stack([differences.sum(dtype=torch.float64), squares.sum(dtype=torch.float64)]).cpu()


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that cover a weight of `shape` `[N, K]`, each of about four million values."""
    step = max(1, _BLOCK_VALUES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
