"""A group's weights quantized by pieces of rows, each by one rank; every rank gets them all.

The pieces are the same for any number of ranks: a matrix product may round its sums differently with another number
of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fourge.checkpoint.reader import byte_view
from fourge.methods.base import RoundRows
from fourge.methods.sweep import rows_per_chunk
from fourge.nvfp4.fp8 import Fp8Weight
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.walk.ranks import Ranks
from fourge.walk.weight_error import RelativeError, squared_sums

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
        step = rows_per_chunk(weight.device, weight.shape[1])
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
    made: dict[str, QuantizedWeight | Fp8Weight] = {}
    errors = {name: RelativeError() for name in weights}
    for piece, (sums, *tensors) in zip(pieces, ranks.share(pieces, work), strict=True):
        errors[piece.name].add_sums(sums)
        if piece.name not in made:
            made[piece.name] = _with_room(tensors, len(weights[piece.name]))
        for whole, part in zip(vars(made[piece.name]).values(), tensors[:2], strict=False):
            if whole is not part:
                _copy(part, whole[piece.rows])
    return {name: (made[name], errors[name].value) for name in weights}


def _with_room(tensors: Sequence[Tensor], rows: int) -> QuantizedWeight | Fp8Weight:
    """A weight for the pieces' codes and scales, `[rows, …]`, with the scale that all share in NVFP4; where the first
    piece's `tensors` are all there is, of these."""
    codes, scales, *shared = tensors
    if len(codes) < rows:
        codes, scales = (part.new_empty(rows, *part.shape[1:]) for part in (codes, scales))
    return QuantizedWeight(codes, scales, shared[0]) if shared else Fp8Weight(codes, scales)


def _copy(part: Tensor, place: Tensor) -> None:
    """On a CPU in one thread: torch's would wait for each other after every piece."""
    if part.device.type == "cpu":
        byte_view(place)[:] = byte_view(part)
    else:
        place.copy_(part)
