"""Compensating a layer's groups: both lanes side by side, for what the quantized one falls short of.

Fitted on calibration tokens, its strength chosen on validation tokens; see `fourge.methods.tuned`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourge.checkpoint.architecture import LinearGroup
from fourge.methods.hessian import HessianAccumulator
from fourge.methods.tuned import BLOCK_ROWS, CrossMoment, Judge, compensate
from fourge.walk.hidden import HiddenFile
from fourge.walk.layer import LaneLayer
from fourge.walk.linear import InputSite, to_nvfp4
from fourge.walk.observers import SeenEnoughError
from fourge.walk.smoothing import SAMPLED, WATCHED, InputSample
from fourge.walk.streams import MicroBatch
from fourge.walk.walk import Walk


class GroupTap:
    """What one lane's layer hands to a group: its input, and the residual stream that its output is added to.

    The layer is to be built with `site` for the group, then attached.
    """

    def __init__(self, group: LinearGroup, global_scale: Tensor | None = None) -> None:
        self.site = InputSite(to_nvfp4(global_scale), self._take)
        self._added_to = group.added_to
        self._seen: dict[str, Tensor] = {}

    def attach(self, lane: LaneLayer) -> None:
        if self._added_to is not None:
            lane.observe_input(self._added_to, lambda hidden: self._keep("residual", hidden))

    def _take(self, x: Tensor) -> None:
        self._keep("inputs", x)
        raise SeenEnoughError

    def _keep(self, what: str, rows: Tensor) -> None:
        self._seen[what] = rows.reshape(-1, rows.shape[-1])

    @property
    def inputs(self) -> Tensor:
        """Of the last micro-batch, `[T, K]`, as the Linears multiply it."""
        return self._seen["inputs"]

    @property
    def residual(self) -> Tensor | None:
        """Likewise, `[T, N]`; None where the output is not added to it."""
        return self._seen.get("residual")


@dataclass(frozen=True)
class GroupLanes:
    """Both lanes of a layer, tapped at one group, whose source weights are `weights`, by name relative to the layer."""

    walk: Walk
    source: HiddenFile
    weights: Mapping[str, Tensor]
    bf16: tuple[LaneLayer, GroupTap]
    nvfp4: tuple[LaneLayer, GroupTap]

    @property
    def whole(self) -> bool:
        """Whether a shortfall is that of the output: so where there is but one Linear to have one."""
        return len(self.weights) == 1

    def run(self, name: str, tokens: int | None, take: Callable[[Tensor, Tensor], None]) -> None:
        """Calls `take` with the shortfall and the quantized input of each micro-batch of the set `name`.

        Of all of them, or of some from all over the set with about `tokens` tokens.
        """
        pairs = list(zip(*(self._batches(name, lane, tokens) for lane in ("bf16", "nvfp4")), strict=True))
        for shortfall, inputs in self.walk.ranks.share(pairs, self._look):
            take(shortfall, inputs)

    def _look(self, batches: tuple[MicroBatch, ...]) -> tuple[Tensor, Tensor]:
        """The shortfall and the quantized input of one micro-batch, given in both lanes."""
        for batch, (lane, _) in zip(batches, (self.bf16, self.nvfp4), strict=True):
            self.walk.look(lane, batch, self.source)
        return self._shortfall(), self.nvfp4[1].inputs

    def _batches(self, name: str, lane: str, tokens: int | None) -> tuple[MicroBatch, ...]:
        stream = self.walk.stream(name, lane)
        assert stream is not None
        return stream.batches if tokens is None else stream.spread_batches(tokens)

    def _shortfall(self) -> Tensor:
        """x − q `[T, K]`, or W (x − q) + r `[T, N]`, of the last micro-batch."""
        there, here = self.bf16[1], self.nvfp4[1]
        shortfall = there.inputs.float() - here.inputs.float()
        if not self.whole:
            return shortfall
        (weight,) = self.weights.values()
        shortfall = shortfall @ weight.float().T
        if there.residual is not None and here.residual is not None:
            shortfall += there.residual.float() - here.residual.float()
        return shortfall


def compensate_group(
    lanes: GroupLanes, hessian: HessianAccumulator, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The group's weights, moved where that helps, and what was decided, for the record; fills `hessian` with Σ q qᵀ.

    A group with fewer tokens than columns is left as it is, and nothing is decided.
    """
    first = next(iter(lanes.weights.values()))
    size = first.shape[0] if lanes.whole else first.shape[1]
    ranks = lanes.walk.ranks
    cross = CrossMoment(size, first.shape[1], first.device, (ranks.turn, ranks.size))

    def fit(shortfall: Tensor, inputs: Tensor) -> None:
        hessian.add(inputs)
        cross.add(shortfall, inputs)

    lanes.run("calibration", None, fit)
    ranks.fill(hessian.summed_blocks())
    ranks.fill(cross.summed_blocks())
    if hessian.tokens < first.shape[1]:
        return dict(lanes.weights), None
    found = compensate(lanes.weights, hessian.matrix, cross, _judge(lanes, seed), whole=lanes.whole)
    kept = found.strength is not None
    return found.weights, {"strength": found.strength, "validation_error": [1.0, found.error], "kept": kept}


def _judge(lanes: GroupLanes, seed: int) -> Judge:
    """A sample of the validation set."""
    stream = lanes.walk.stream("validation", "bf16")
    assert stream is not None
    tokens = sum(batch.num_tokens for batch in stream.spread_batches(WATCHED))
    shortfalls, inputs = InputSample(tokens, seed), InputSample(tokens, seed)

    def draw(shortfall: Tensor, seen: Tensor) -> None:
        shortfalls.add(shortfall)
        inputs.add(seen)

    lanes.run("validation", WATCHED, draw)
    return Judge(shortfalls.rows(), inputs.rows())


def compensation_bytes(columns: int, rows: int) -> int:
    """What it takes beside the layer and the Hessian for a Linear `[rows, columns]`: the cross moment, the Cholesky
    factor, blocks of rows, and the sample that judges."""
    values = columns * (columns + max(rows, columns)) + 4 * BLOCK_ROWS * columns + 2 * SAMPLED * (rows + columns)
    return torch.float32.itemsize * values
