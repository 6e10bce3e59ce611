"""A group's weights quantized by pieces of rows, each by one rank; every rank gets them all.

The pieces are the same for any number of ranks: a matrix product may round its sums differently with another number
of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourge.methods.base import RoundRows
from fourge.nvfp4.fp8 import Fp8Weight
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.walk.ranks import Ranks
from fourge.walk.weight_error import RelativeError, squared_sums

_VALUES = 1 << 25
_ROWS_ON_CPU = 1024  # fewer cost time, more leave nothing to share; on a GPU a piece is many thousand kernel launches


@dataclass(frozen=True)
class Piece:
    """Some rows of the weight called `name`."""

    name: str
    rows: slice


def pieces_of(weights: Mapping[str, Tensor]) -> list[Piece]:
    """All rows of `weights`, name → `[N, K]`."""
    found = []
    for name, weight in weights.items():
        step = max(1, _VALUES // weight.shape[1])
        if weight.device.type == "cpu":
            step = min(step, _ROWS_ON_CPU)
        found += [Piece(name, slice(start, start + step)) for start in range(0, len(weight), step)]
    return found


def quantize_by_rows(
    weights: Mapping[str, Tensor], sources: Mapping[str, Tensor], round_rows: RoundRows, ranks: Ranks
) -> dict[str, tuple[QuantizedWeight | Fp8Weight, float]]:
    """`weights`, name → `[N, K]`, quantized, each with its relative error to the weight of that name in `sources`."""

    def work(piece: Piece) -> tuple[Tensor, ...]:
        quantized = round_rows(weights[piece.name][piece.rows])
        return squared_sums(sources[piece.name][piece.rows], quantized), *vars(quantized).values()

    pieces = pieces_of(weights)
    made: dict[str, list[Sequence[Tensor]]] = {name: [] for name in weights}
    errors = {name: RelativeError() for name in weights}
    for piece, (sums, *tensors) in zip(pieces, ranks.share(pieces, work), strict=True):
        made[piece.name].append(tensors)
        errors[piece.name].add_sums(sums)
    return {name: (_joined(parts), errors[name].value) for name, parts in made.items()}


def _joined(parts: Sequence[Sequence[Tensor]]) -> QuantizedWeight | Fp8Weight:
    """One weight of the tensors of its pieces: codes and scales by rows, and in NVFP4 the scale that all share."""
    codes, scales, *shared = zip(*parts, strict=True)
    values, scale = (tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in (codes, scales))
    return QuantizedWeight(values, scale, shared[0][0]) if shared else Fp8Weight(values, scale)
