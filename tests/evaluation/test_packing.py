"""Packed rows against brute force: every path whole, the budget kept, ancestors alone visible, no cheaper cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourge.evaluation.packing import Packing, RowCost, pack

CHEAP_ROWS = RowCost(overhead=1.0, attention=1e9)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
SEQUENCES = st.lists(TOKENS, min_size=1, max_size=9)


def arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(sequence, dtype=np.int32) for sequence in sequences]


def visible(parents: list[int], token: int) -> set[int]:
    """A token and its ancestors, by following parents."""
    seen = set()
    while token >= 0:
        seen.add(token)
        token = parents[token]
    return seen


def trie(sequences: list[np.ndarray]) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """A textbook trie with children in the order of their tokens, depth first: tokens, parents, depths, paths."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []

    def grow(group: list[tuple[int, ...]], depth: int, parent: int, path: list[int]) -> None:
        for sequence in group:
            if len(sequence) == depth:
                paths[sequence] = path
        for token in sorted({s[depth] for s in group if len(s) > depth}):
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            depths.append(depth)
            grow([s for s in group if len(s) > depth and s[depth] == token], depth + 1, node, [*path, node])

    paths: dict[tuple[int, ...], list[int]] = {}
    grow([tuple(s.tolist()) for s in sequences], 0, -1, [])
    return tokens, parents, depths, [paths[tuple(s.tolist())] for s in sequences]


def require_tries(packing: Packing) -> None:
    """Every row is the trie of its own sequences: tokens, depths, who sees whom, where each sequence lies."""
    places = dict(packing.paths())
    for row in packing.rows:
        chosen = list(packing.sequences[row.first : row.last])
        tokens, parents, depths, paths = trie(chosen)
        assert packing.tokens(row).tolist() == tokens
        tree = packing.tree(row)
        assert tree.positions.tolist() == depths
        mask = tree.ancestors()
        for token in range(len(tokens)):
            assert set(mask[token].nonzero()[:, 0].tolist()) == visible(parents, token)
        for k, path in zip(range(row.first, row.last), paths, strict=True):
            assert (places[k] - row.first_token).tolist() == path
        assert row.is_chain == (len(chosen) == 1)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES, st.integers(1, 20))
def test_rows_are_tries_of_all_sequences_within_the_budget(sequences: list[list[int]], budget: int) -> None:
    packing = pack(arrays(sequences), budget, CHEAP_ROWS)
    require_tries(packing)
    for sequence, place in zip(sequences, packing.places, strict=True):
        assert packing.sequences[place].tolist() == sequence
    assert [row.first for row in packing.rows] == [0, *(row.last for row in packing.rows[:-1])]
    assert packing.rows[-1].last == len(packing.sequences) == len({tuple(s) for s in sequences})
    assert [row.first_token for row in packing.rows] == [0, *(row.last_token for row in packing.rows[:-1])]
    for row in packing.rows:
        assert row.num_tokens <= budget or row.is_chain


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.integers(1, 25), st.floats(0, 20), st.floats(2, 50))
def test_no_other_cuts_cost_less(sequences: list[list[int]], budget: int, overhead: float, attention: float) -> None:
    cost = RowCost(overhead, attention)
    packing = pack(arrays(sequences), budget, cost)
    ordered = sorted({tuple(s) for s in sequences})

    def size(first: int, last: int) -> int:
        return len({s[: n + 1] for s in ordered[first:last] for n in range(len(s))})

    best = [0.0]
    for last in range(1, len(ordered) + 1):
        options = [
            best[first] + overhead + size(first, last) + size(first, last) ** 2 / attention
            for first in range(last)
            if size(first, last) <= budget or first == last - 1
        ]
        best.append(min(options))
    paid = sum(float(cost(np.array(row.num_tokens))) for row in packing.rows)
    assert paid == pytest.approx(best[-1])


def test_choices_of_one_question_are_one_row_and_questions_share_their_shots() -> None:
    shots, questions = list(range(100, 150)), [[1, 2, 3], [4, 5]]
    sequences = [shots + question + [choice] for question in questions for choice in (7, 8, 9)]
    packing = pack(arrays(sequences), 1000, CHEAP_ROWS)
    assert len(packing.rows) == 1
    assert packing.num_tokens == 50 + (3 + 3) + (2 + 3)
    again = pack(arrays(sequences), 56, CHEAP_ROWS)
    assert [row.num_tokens for row in again.rows] == [56, 55]


def test_the_order_of_requests_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    sequences = arrays([rng.integers(0, 3, rng.integers(1, 8)).tolist() for _ in range(40)])
    one, other = pack(sequences, 30, CHEAP_ROWS), pack(sequences[::-1], 30, CHEAP_ROWS)
    assert one.rows == other.rows
    assert all(np.array_equal(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))
