"""Sequences that share beginnings, packed into rows so that what they share in a row is computed once.

Sorted, the sequences are the leaves of their token tree from left to right, and each adds to the row only what it
does not share with the one before it. A row is a run of them; the first of a row brings its whole beginning along.
So where to cut is all there is to choose: the cheapest cuts are found by dynamic programming over the sorted list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from fourge.walk.tree import Tree


@dataclass(frozen=True)
class RowCost:
    """What a row of T tokens costs, counted in tokens of a layer's Linears: `overhead + T + T² / attention`.

    `overhead` is what every row pays whatever its length (weights are widened anew for each); the square is that
    of attention, which computes the masked pairs of a row too.
    """

    overhead: float
    attention: float

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        cost: np.ndarray = self.overhead + tokens + tokens.astype(np.float64) ** 2 / self.attention
        return cost


@dataclass(frozen=True)
class Row:
    """Sequences `[first, last)` of a packing; its tokens are `[first_token, last_token)` of all rows'."""

    first: int
    last: int
    first_token: int
    last_token: int

    @property
    def num_tokens(self) -> int:
        return self.last_token - self.first_token

    @property
    def is_chain(self) -> bool:
        """Whether it is one sequence, and so needs no mask of its own."""
        return self.last - self.first == 1


@dataclass(frozen=True)
class Packing:
    """Distinct `sequences` (int32 1-d each) in lexicographic order, cut into `rows`.

    `shared[k]` int64 is how many tokens sequence k begins with that sequence k − 1 has too, `places[i]` int64 where
    in the order the caller's sequence i is.
    """

    sequences: tuple[np.ndarray, ...]
    shared: np.ndarray
    places: np.ndarray
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, over all rows."""
        return self.rows[-1].last_token if self.rows else 0

    def tokens(self, row: Row) -> np.ndarray:
        """The token ids of a row, int32 `[T]`."""
        return np.concatenate([self.sequences[k][self._known(row, k) :] for k in range(row.first, row.last)])

    def tree(self, row: Row) -> Tree:
        """Depth and descendants of a row's tokens."""
        ends = np.full(row.num_tokens, row.num_tokens, dtype=np.int64)
        positions = np.empty(row.num_tokens, dtype=np.int64)
        path = np.empty(0, dtype=np.int64)
        for k, longer in self._paths(row):
            known = self._known(row, k)
            ends[path[known:]] = longer[known]
            positions[longer[known:]] = np.arange(known, len(longer))
            path = longer
        return Tree(torch.from_numpy(positions), torch.from_numpy(ends))

    def paths(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every sequence's number in the order, and where its tokens are among all rows', int64."""
        for row in self.rows:
            for k, path in self._paths(row):
                yield k, path + row.first_token

    def _known(self, row: Row, k: int) -> int:
        """How many of sequence k's tokens the row has already when it comes to k."""
        return 0 if k == row.first else int(self.shared[k])

    def _paths(self, row: Row) -> Iterator[tuple[int, np.ndarray]]:
        path = np.empty(0, dtype=np.int64)
        begin = 0
        for k in range(row.first, row.last):
            known = self._known(row, k)
            added = len(self.sequences[k]) - known
            path = np.concatenate([path[:known], np.arange(begin, begin + added)])
            begin += added
            yield k, path


def pack(sequences: Sequence[np.ndarray], budget: int, cost: RowCost) -> Packing:
    """Packs `sequences` (int32 1-d, at least one, none empty) into rows of at most `budget` tokens at least cost.

    A sequence longer than the budget is a row of its own. The result depends on the set of sequences alone.
    """
    # Big-endian, so that the order of the bytes is the order of the tokens.
    encoded = [sequence.astype(">u4").tobytes() for sequence in sequences]
    ordered = sorted(set(encoded))
    place = {key: k for k, key in enumerate(ordered)}
    distinct = tuple(np.frombuffer(key, ">u4").astype(np.int32) for key in ordered)
    shared = np.array([0, *(_common_beginning(a, b) for a, b in pairwise(distinct))], dtype=np.int64)
    lengths = np.array([len(sequence) for sequence in distinct], dtype=np.int64)
    rows = []
    begin = 0
    for first, last in _cheapest_cuts(lengths, shared, budget, cost):
        tokens = int((lengths[first:last] - shared[first:last]).sum() + shared[first])
        rows.append(Row(first, last, begin, begin + tokens))
        begin += tokens
    return Packing(distinct, shared, np.array([place[key] for key in encoded], dtype=np.int64), tuple(rows))


def _common_beginning(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _cheapest_cuts(lengths: np.ndarray, shared: np.ndarray, budget: int, cost: RowCost) -> list[tuple[int, int]]:
    """The rows `[first, last)` of least total cost."""
    count = len(lengths)
    # Tokens of the row [i, j): those added by i, …, j − 1, and what i shares with the one before the row.
    added = np.concatenate([[0], np.cumsum(lengths - shared)])
    least = np.zeros(count + 1)
    came_from = np.zeros(count + 1, dtype=np.int64)
    for j in range(1, count + 1):
        window = slice(min(int(np.searchsorted(added, added[j] - budget)), j - 1), j)
        tokens = added[j] - added[window] + shared[window]
        total = least[window] + cost(tokens)
        total[:-1][tokens[:-1] > budget] = np.inf
        best = int(np.argmin(total))
        least[j], came_from[j] = total[best], window.start + best
    cuts = []
    j = count
    while j:
        cuts.append((int(came_from[j]), j))
        j = int(came_from[j])
    return cuts[::-1]
