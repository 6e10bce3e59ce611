"""Requests laid out for a walk: the rows to run, and which token predicts what for whom."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fourge.evaluation.packing import Packing, RowCost, pack
from fourge.evaluation.requests import ScoreRequest


@dataclass(frozen=True)
class ScoringPlan:
    """The rows of `packing`, and the scored pairs (token, next token) of all requests one after the other.

    Request r has the pairs `[first_pair[r], first_pair[r + 1])`; `nodes` int64 `[pairs]` says which of the walked
    tokens predicts, `targets` int32 `[pairs]` what is to be predicted. That is 12 bytes a pair; at the head
    it is about 60 with two lanes, indices and results included.
    """

    packing: Packing
    first_pair: np.ndarray
    nodes: np.ndarray
    targets: np.ndarray
    contexts: np.ndarray
    """int64 `[requests]`: the number of the request's context; requests with the same tokens before the first scored
    one have the same."""

    @property
    def clusters(self) -> np.ndarray:
        """For every pair the number of its request's context, int64 `[pairs]`."""
        return np.repeat(self.contexts, np.diff(self.first_pair))


def plan_scoring(requests: Sequence[ScoreRequest], budget: int, cost: RowCost) -> ScoringPlan:
    """Packs what the requests read into rows of at most `budget` tokens; the requests are distinct."""
    packing = pack([request.inputs for request in requests], budget, cost)
    counts = np.array([request.scored for request in requests], dtype=np.int64)
    first_pair = np.concatenate([[0], np.cumsum(counts)])
    nodes = np.empty(first_pair[-1], dtype=np.int64)
    readers = _readers(packing)
    for place, path in packing.paths():
        for r in readers[place]:
            nodes[first_pair[r] : first_pair[r + 1]] = path[len(path) - counts[r] :]
    targets = [request.tokens[-request.scored :] for request in requests]
    numbers: dict[bytes, int] = {}
    contexts = [numbers.setdefault(request.context.tobytes(), len(numbers)) for request in requests]
    return ScoringPlan(packing, first_pair, nodes, np.concatenate(targets), np.array(contexts, dtype=np.int64))


def _readers(packing: Packing) -> list[list[int]]:
    """For every sequence of the packing the requests that read it."""
    readers: list[list[int]] = [[] for _ in packing.sequences]
    for request, place in enumerate(packing.places):
        readers[place].append(request)
    return readers


@dataclass(frozen=True)
class Answers:
    """What a lane answers a request: log-likelihood in nats, FP64, and whether all of it is greedy; `[requests]`."""

    log_likelihood: np.ndarray
    greedy: np.ndarray


def sum_answers(log_prob: np.ndarray, greedy: np.ndarray, first_pair: np.ndarray) -> Answers:
    """Pairs' log p and greedy flags gathered by request."""
    return Answers(np.add.reduceat(log_prob, first_pair[:-1]), np.logical_and.reduceat(greedy, first_pair[:-1]))
