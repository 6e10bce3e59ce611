"""Sequences that share beginnings, laid out as one row: which token may look at which."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Tokens of a forest in depth-first order, so that a token's descendants follow it without a gap.

    `positions` int64 `[T]` are depths from 0, the positions that a model is told. `ends` int64 `[T]`: token i and
    all its descendants are `[i, ends[i])`.
    """

    positions: Tensor
    ends: Tensor

    @property
    def depth(self) -> int:
        """The number of tokens on the longest path."""
        return int(self.positions.max()) + 1

    def ancestors(self) -> Tensor:
        """Bool `[T, T]`: whether token i (row) may look at token j (column), which is itself or an ancestor."""
        place = torch.arange(len(self.ends), device=self.ends.device)
        return (place <= place[:, None]) & (place[:, None] < self.ends)
