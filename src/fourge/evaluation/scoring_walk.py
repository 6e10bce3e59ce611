"""The walk over lm-eval's requests: every lane through every layer, then what the head says of what is scored."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourge.evaluation.budget import head_chunk_rows
from fourge.evaluation.lanes import ScoringLane
from fourge.evaluation.packing import Row
from fourge.evaluation.scoring import ScoringPlan, sum_answers
from fourge.evaluation.scoring_job import ScoringJob
from fourge.progress import WalkProgress, announced
from fourge.walk.ahead import RowWriter, read_rows
from fourge.walk.head import ROWS, Divergence, LaneScores, Targets, score_heads
from fourge.walk.held_folder import WalkPaths
from fourge.walk.hidden import HiddenFile, HiddenLayout, create_together, finish_together
from fourge.walk.layer import LaneLayer
from fourge.walk.ranks import Ranks, spans
from fourge.walk.statistics import clustered_mean
from fourge.walk.tree import Tree
from fourge.walk.walk import out_of_range


@dataclass(frozen=True)
class ScoringWalk:
    """One pass over the weights of every lane for all of a plan's rows.

    A hidden-state file holds the rows of the first lane, then those of the second. Holds no state between steps
    but the files, so that a walk can be continued from any of them, to the same bits. With `keep_top` the answers
    hold the likeliest token of every pair as well, `LANE_top`.
    """

    lanes: tuple[ScoringLane, ...]
    plan: ScoringPlan
    title: str = "evaluate"
    keep_top: bool = False

    @property
    def hidden_layout(self) -> HiddenLayout:
        walk = self.lanes[0].walk
        return HiddenLayout(len(self.lanes) * self.plan.packing.num_tokens, walk.skeleton.hidden_size, walk.dtype)

    @property
    def _num_layers(self) -> int:
        return self.lanes[0].layout.num_layers

    @property
    def ranks(self) -> Ranks:
        """Those that share the work: each calls `run`, at the same time."""
        return self.lanes[0].walk.ranks

    def run(self, folder: WalkPaths, first: int) -> None:
        """Runs every step from `first` on. Rank 0 commits, and is to be given its ScoringJob as the `folder`.

        Raises InputError where hidden states leave the dtype's range.
        """
        job = folder if isinstance(folder, ScoringJob) else None
        with self.ranks.as_one():
            if job is not None:
                self._check(job)
        steps = self._num_layers + 2
        with WalkProgress(self.title, steps, first, folder.metrics_path, costs=self._costs()) as progress:
            for step in range(first, steps - 1):
                with create_together(folder.hidden_temporary, self.hidden_layout, self.ranks) as target:
                    self._step(step, folder, target, progress)
                    checksum = finish_together(target, self.ranks)
                if job is not None:
                    job.commit_hidden(checksum)
                self.ranks.wait()
                progress.finish_step(self.lanes[0].layout.step_name(step), "", {"step": step})
            with HiddenFile(folder.hidden_path(steps - 1), self.hidden_layout, create=False) as source:
                answers, facts = self._head(source, progress)
            if job is not None:
                job.finish(answers, facts)
            progress.finish_step("head", "", {"step": steps - 1})

    def _check(self, job: ScoringJob) -> None:
        if job.next_step:
            job.check_hidden(self.hidden_layout)
            return
        with announced("Checking embedding and head for NaN and Inf"):
            for lane in self.lanes:
                lane.require_finite_ends()

    def _costs(self) -> list[float]:
        """What each step costs relative to a decoder layer, for an ETA."""
        lane = self.lanes[0]
        sizes = [sum(lane.walk.skeleton.shapes[name][0] for name in names) for names in lane.layout.steps]
        scored = len(np.unique(self.plan.nodes)) / self.plan.packing.num_tokens
        return [0.01, *[1.0] * self._num_layers, 0.01 + sizes[0] / sizes[1] * scored]

    def _step(self, step: int, folder: WalkPaths, target: HiddenFile, progress: WalkProgress) -> None:
        if step == 0:
            self._embed(target, progress)
            return
        with HiddenFile(folder.hidden_path(step), self.hidden_layout, create=False) as source:
            for number, lane in enumerate(self.lanes):
                with lane.layer(step - 1, progress) as layer:
                    self._run_layer(number, lane, layer, source, target, progress)

    def _first_row(self, lane: int) -> int:
        return lane * self.plan.packing.num_tokens

    def _embed(self, target: HiddenFile, progress: WalkProgress) -> None:
        for number, lane in enumerate(self.lanes):
            name, first = f"{lane.layout.architecture.embedding}.weight", self._first_row(number)

            def look_up(row: Row, lane: ScoringLane = lane, name: str = name, first: int = first) -> Sequence[Tensor]:
                tokens = torch.from_numpy(self.plan.packing.tokens(row).astype(np.int64))
                states = lane.checkpoint.gather_rows(name, tokens).to(lane.walk.dtype)
                target.write(first + row.first_token, states)
                return ()

            self._run_rows(look_up, progress)

    def _run_layer(
        self,
        number: int,
        lane: ScoringLane,
        layer: LaneLayer,
        source: HiddenFile,
        target: HiddenFile,
        progress: WalkProgress,
    ) -> None:
        first, device = self._first_row(number), lane.walk.device
        own = self.ranks.own(self.plan.packing.rows)
        spans = [(first + row.first_token, first + row.last_token) for row in own]
        refused = out_of_range(layer.index, "the requests", lane.name, lane.walk.dtype)
        with closing(read_rows(source, spans, device)) as coming, RowWriter(target, refused) as writer:

            def forward(row: Row) -> Sequence[Tensor]:
                states = next(coming)
                tree = None if row.is_chain else _to(self.plan.packing.tree(row), device)
                writer.write(first + row.first_token, layer(states[None], tree)[0])
                return ()

            self._run_rows(forward, progress)
            with self.ranks.as_one():
                writer.wait()

    def _run_rows(self, work: Callable[[Row], Sequence[Tensor]], progress: WalkProgress) -> None:
        """Has the ranks do `work` on every row, each on its own."""
        rows = self.plan.packing.rows
        for row, _ in zip(rows, self.ranks.share(rows, work), strict=True):
            self._advance(row, progress)

    def _advance(self, row: Row, progress: WalkProgress) -> None:
        progress.advance(row.num_tokens / self.hidden_layout.rows, tokens=row.num_tokens)

    # The head

    def _head(self, source: HiddenFile, progress: WalkProgress) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The answers to keep, by lane and kind, and the measures of how far the lanes are apart."""
        nodes, place = np.unique(self.plan.nodes, return_inverse=True)
        order = np.argsort(place, kind="stable")
        ordered, pairs = place[order], len(order)

        def inside(part: slice) -> np.ndarray:
            """The pairs that the nodes of `part` predict, in the nodes' order."""
            return order[slice(*np.searchsorted(ordered, [part.start, part.stop]))]

        def score(part: slice) -> Sequence[Tensor]:
            chosen = inside(part)
            targets = Targets(
                torch.from_numpy(place[chosen] - part.start),
                torch.from_numpy(self.plan.targets[chosen].astype(np.int64)),
            )
            share = (part.stop - part.start) / len(nodes) / len(self.lanes)
            found, divergence = self._score_chunk(source, nodes[part], targets, share, progress)
            arrays = [array for scores in found for array in (scores.log_prob, scores.greedy, scores.top)]
            arrays += [] if divergence is None else [divergence.kl_div, divergence.top1_agrees]
            return [torch.from_numpy(array) for array in arrays]

        scores = [
            LaneScores(np.empty(pairs), np.empty(pairs, dtype=bool), np.empty(pairs, dtype=np.int32))
            for _ in self.lanes
        ]
        divergences: list[Divergence] = []
        parts = self._head_parts(len(nodes))
        for part, tensors in zip(parts, self.ranks.share(parts, score), strict=True):
            arrays, chosen = [tensor.numpy() for tensor in tensors], inside(part)
            for number, kept in enumerate(scores):
                kept.log_prob[chosen], kept.greedy[chosen], kept.top[chosen] = arrays[3 * number : 3 * number + 3]
            divergences += [Divergence(*arrays[3 * len(scores) :])] if len(scores) == 2 else []
        return self._answers(scores), self._measures(divergences, place)

    def _head_parts(self, num_nodes: int) -> list[slice]:
        """The nodes cut up so that every rank has as many, and holds the final states of one part at a time."""
        most = head_chunk_rows(self.lanes)
        rounds = max(1, -(-num_nodes // (most * self.ranks.size)))
        return spans(num_nodes, ROWS, rounds * self.ranks.size)

    def _answers(self, scores: Sequence[LaneScores]) -> dict[str, np.ndarray]:
        answers: dict[str, np.ndarray] = {}
        for lane, lane_scores in zip(self.lanes, scores, strict=True):
            summed = sum_answers(lane_scores.log_prob, lane_scores.greedy, self.plan.first_pair)
            answers |= {f"{lane.name}_log_likelihood": summed.log_likelihood, f"{lane.name}_greedy": summed.greedy}
            if self.keep_top:
                answers[f"{lane.name}_top"] = lane_scores.top
        return answers

    @torch.no_grad()
    def _score_chunk(
        self, source: HiddenFile, nodes: np.ndarray, targets: Targets, share: float, progress: WalkProgress
    ) -> tuple[tuple[LaneScores, ...], Divergence | None]:
        """Scores one chunk of walked tokens; their final hidden states are held, the head goes by."""
        device = self.lanes[0].walk.device
        states = [self._final_states(number, nodes, source) for number in range(len(self.lanes))]
        heads = (lane.walk.head_blocks(lambda part, _: progress.advance(part * share)) for lane in self.lanes)
        return score_heads(
            lambda rows: tuple(lane_states[rows] for lane_states in states),
            len(nodes),
            Targets(targets.rows.to(device), targets.tokens.to(device)),
            zip(*heads, strict=True),
        )

    def _final_states(self, number: int, nodes: np.ndarray, source: HiddenFile) -> Tensor:
        """The hidden states `[n, hidden]` of walked tokens `nodes`, ascending, after the final norm."""
        walk = self.lanes[number].walk
        norm = walk.final_norm()
        rows = self._first_row(number) + nodes
        states = torch.empty(len(rows), self.hidden_layout.width, dtype=walk.dtype, device=walk.device)
        for begin, end in _runs(rows):
            read = source.read(int(rows[begin]), int(rows[end - 1]) + 1).to(walk.device)
            states[begin:end] = norm(read)
        return states

    def _measures(self, divergences: list[Divergence], place: np.ndarray) -> dict[str, Any]:
        """KL and top-1 agreement over the distinct tokens that predict, clustered by the context of the first
        request that scores them; None for one lane."""
        if not divergences:
            return {"kl_div": None, "top1_agreement": None}
        _, first_pair = np.unique(place, return_index=True)
        clusters = self.plan.clusters[first_pair]
        kl_div = np.concatenate([divergence.kl_div for divergence in divergences])
        agrees = np.concatenate([divergence.top1_agrees for divergence in divergences])
        return {
            "kl_div": asdict(clustered_mean(kl_div, clusters)),
            "top1_agreement": asdict(clustered_mean(agrees, clusters)),
        }


_LONGEST_RUN = 1024


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Slices of ascending `rows` that lie without a gap, each of at most 1024: one read each."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        for start in range(begin, end, _LONGEST_RUN):
            yield start, min(start + _LONGEST_RUN, end)


def _to(tree: Tree, device: torch.device) -> Tree:
    return Tree(tree.positions.to(device), tree.ends.to(device))
