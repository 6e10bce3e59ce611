"""Compensating a layer's groups: all lanes side by side, for what the quantized ones fall short of.

Fitted on calibration tokens, its strength chosen on validation tokens; see `fourge.methods.tuned`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
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
from fourge.walk.streams import Lane, MicroBatch
from fourge.walk.walk import Walk, look

SERVED: Mapping[Lane, float] = {"nvfp4": 1.0, "nvfp4a16": 3.0}
"""The lanes that a checkpoint is run as, the second where the first rounds inputs and something compensates; and how
much a token counts in each. Alike, the larger errors of the first had their way, at the second's cost (docs/LOG.md)."""


class GroupTap:
    """What one lane's layer hands to a group: its input, and the residual stream that its output is added to.

    The layer is built with `site` for the group, then attached.
    """

    def __init__(self, group: LinearGroup, global_scale: Tensor | None = None) -> None:
        seen: dict[str, Tensor] = {}

        def take(x: Tensor) -> None:
            seen["inputs"] = x.flatten(0, -2)
            raise SeenEnoughError

        # Not a method: the site must not lead back to the tap, or both outlive the layer, tensors and all.
        self.site = InputSite(to_nvfp4(global_scale), take)
        self._added_to = group.added_to
        self._seen = seen

    def attach(self, lane: LaneLayer) -> None:
        if self._added_to is not None:
            lane.observe_input(self._added_to, self._take_residual)

    def _take_residual(self, hidden: Tensor) -> None:
        self._seen["residual"] = hidden.flatten(0, -2)

    @property
    def inputs(self) -> Tensor:
        """Of the last micro-batch, `[T, K]`, as the Linears multiply it."""
        return self._seen["inputs"]

    @property
    def residual(self) -> Tensor | None:
        """Likewise, `[T, N]`; None where the output is not added to it."""
        return self._seen.get("residual")


@dataclass(frozen=True)
class TappedLane:
    """A layer as `lane` runs it, tapped at one group: built with `tap.site` for it."""

    lane: Lane
    layer: LaneLayer
    tap: GroupTap

    def __post_init__(self) -> None:
        self.tap.attach(self.layer)


@dataclass(frozen=True)
class GroupLanes:
    """The lanes of a layer at one group, whose source weights are `weights`, by name relative to the layer."""

    walk: Walk
    source: HiddenFile
    weights: Mapping[str, Tensor]
    bf16: TappedLane
    served: Sequence[TappedLane]

    @property
    def whole(self) -> bool:
        """Whether a shortfall is that of the output: so where there is but one Linear to have one."""
        return len(self.weights) == 1

    def run(self, name: str, tokens: int | None, take: Sequence[Callable[[Tensor, Tensor], None]]) -> None:
        """Calls each of `take`, one for each of `served`, with its shortfall and input of every micro-batch in turn.

        Of all of the set `name`, or of some from all over it with about `tokens` tokens.
        """
        lanes = (self.bf16, *self.served)
        every = list(zip(*(self._batches(name, lane.lane, tokens) for lane in lanes), strict=True))
        weight = next(iter(self.weights.values())) if self.whole else None
        with self.walk.rows(chain.from_iterable(self.walk.ranks.own(every)), self.source) as coming:

            def run_one(batches: tuple[MicroBatch, ...]) -> list[Tensor]:
                for lane, batch in zip(lanes, batches, strict=True):
                    look(lane.layer, batch, next(coming))
                norms = output_norms(self.bf16.tap, weight)
                return [part for lane in self.served for part in short_of(self.bf16.tap, lane.tap, weight, norms)]

            for seen in self.walk.ranks.share(every, run_one):
                for each, shortfall, inputs in zip(take, seen[::2], seen[1::2], strict=True):
                    each(shortfall, inputs)

    def _batches(self, name: str, lane: Lane, tokens: int | None) -> tuple[MicroBatch, ...]:
        stream = self.walk.stream(name, lane)
        assert stream is not None
        return stream.batches if tokens is None else stream.spread_batches(tokens)


def output_norms(source: GroupTap, weight: Tensor | None) -> Tensor | None:
    """Norms `[T, 1]` of the residual stream once the source's output W x is added to it; None where it is not.

    `weight` W is the one that there is; zero norms are given as 1.
    """
    if weight is None or source.residual is None:
        return None
    after = source.residual.float() + source.inputs.float() @ weight.float().T
    norms: Tensor = after.norm(dim=1, keepdim=True)
    return norms.masked_fill_(norms == 0, 1.0)


def short_of(source: GroupTap, served: GroupTap, weight: Tensor | None, norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `served` falls short of by `source` in their last micro-batch, and its inputs q `[T, K]`.

    x − q `[T, K]`, or W (x − q) + r `[T, N]` of the one `weight` W there is. Where its output is added to the residual
    stream, both are over `norms` of the source's sum, for what is read of the stream is normed: a few tokens (the
    first of a sequence) carry norms thousands of times the others' and would drown them.
    """
    missing, q = source.inputs.float() - served.inputs.float(), served.inputs
    if weight is None:
        return missing, q
    shortfall = missing @ weight.float().T
    if norms is None:
        return shortfall, q
    assert source.residual is not None and served.residual is not None
    shortfall += source.residual.float() - served.residual.float()
    return shortfall / norms, q.float() / norms


def compensate_group(
    lanes: GroupLanes, hessian: HessianAccumulator, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The group's weights, moved where that helps, and what was decided, for the record; fills `hessian` with Σ q qᵀ.

    Every token counts in each lane that is served, as `SERVED` says. A group with fewer tokens than columns is left as
    it is, and nothing is decided.
    """
    first = next(iter(lanes.weights.values()))
    size = first.shape[0] if lanes.whole else first.shape[1]
    ranks = lanes.walk.ranks
    cross = CrossMoment(size, first.shape[1], first.device, (ranks.turn, ranks.size))

    def fit(shortfall: Tensor, inputs: Tensor, *, lane: TappedLane) -> None:
        weight = SERVED[lane.lane]
        hessian.add(inputs, weight=weight, again=lane is not lanes.served[0])
        cross.add(shortfall, inputs, weight)

    lanes.run("calibration", None, [partial(fit, lane=lane) for lane in lanes.served])
    ranks.fill(hessian.summed_blocks())
    ranks.fill(cross.summed_blocks())
    if hessian.tokens < first.shape[1]:
        return dict(lanes.weights), None
    found = compensate(lanes.weights, hessian.matrix, cross, _judge(lanes, seed), whole=lanes.whole)
    kept = found.strength is not None
    return found.weights, {"strength": found.strength, "validation_error": [1.0, found.error], "kept": kept}


def _judge(lanes: GroupLanes, seed: int) -> Judge:
    """A sample of the validation set, in every lane that is served."""
    stream = lanes.walk.stream("validation", "bf16")
    assert stream is not None
    tokens = sum(batch.num_tokens for batch in stream.spread_batches(WATCHED))
    samples = [(InputSample(tokens, seed), InputSample(tokens, seed)) for _ in lanes.served]

    def draw(shortfall: Tensor, inputs: Tensor, sample: tuple[InputSample, InputSample]) -> None:
        for drawn, rows in zip(sample, (shortfall, inputs), strict=True):
            drawn.add(rows)

    lanes.run("validation", WATCHED, [partial(draw, sample=sample) for sample in samples])
    roots = [math.sqrt(SERVED[lane.lane]) for lane in lanes.served]  # errors are squared
    shortfall, inputs = (
        torch.cat([root * drawn.rows().float() for root, drawn in zip(roots, part, strict=True)])
        for part in zip(*samples, strict=True)
    )
    return Judge(shortfall, inputs)


def compensation_bytes(columns: int, rows: int) -> int:
    """What it takes beside the layer and the Hessian for a Linear `[rows, columns]`: the cross moment, the Cholesky
    factor, blocks of rows, and the sample that judges."""
    values = (
        columns * (columns + max(rows, columns))
        + 4 * BLOCK_ROWS * columns
        + 2 * len(SERVED) * SAMPLED * (rows + columns)
    )
    return torch.float32.itemsize * values
