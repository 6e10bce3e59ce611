"""The pass itself: token sequences through one layer of one lane, micro-batch by micro-batch."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fourge.checkpoint.reader import Checkpoint
from fourge.errors import InputError
from fourge.walk.ahead import RowWriter, read_rows
from fourge.walk.head import ROWS, Fidelity, HeadMeasures, compare_heads, summarise
from fourge.walk.hidden import HiddenFile, HiddenLayout
from fourge.walk.layer import LaneLayer, fill
from fourge.walk.observers import Observers, SeenEnoughError
from fourge.walk.ranks import ALONE, Ranks, spans
from fourge.walk.skeleton import Skeleton
from fourge.walk.statistics import Estimate, clustered_mean
from fourge.walk.streams import Lane, MicroBatch, Stream

_HEAD_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
"""Hidden states are read anew for every block."""


Advance = Callable[[float, int], None]
"""Told of the share of the whole call that a micro-batch was, and of its tokens."""


@dataclass(frozen=True)
class Walk:
    """What stays the same from layer to layer: the model's skeleton, its source, the sequences, the arithmetic.

    With several `ranks`, each of them calls every method here, and runs its share of the micro-batches.
    """

    skeleton: Skeleton
    source: Checkpoint
    streams: tuple[Stream, ...]
    dtype: torch.dtype
    device: torch.device
    ranks: Ranks = ALONE

    @property
    def hidden_layout(self) -> HiddenLayout:
        rows = self.streams[-1].last_row if self.streams else 0
        return HiddenLayout(rows, self.skeleton.hidden_size, self.dtype)

    def stream(self, name: str, lane: str) -> Stream | None:
        """The stream of that name and lane, None when the walk has none."""
        return next((s for s in self.streams if (s.name, s.lane) == (name, lane)), None)

    def embed(self, target: HiddenFile, advance: Advance) -> None:
        """Writes every stream's token embeddings: the hidden states that layer 0 reads."""
        name = f"{self.skeleton.architecture.embedding}.weight"
        total = sum(stream.num_tokens for stream in self.streams)
        for stream in self.streams:

            def write(batch: MicroBatch, stream: Stream = stream) -> Sequence[Tensor]:
                tokens = stream.tokens(batch).reshape(-1)
                target.write(batch.first_row, self.source.gather_rows(name, tokens).to(self.dtype))
                return ()

            for batch, _ in self._each(stream.batches, write):
                advance(batch.num_tokens / total, batch.num_tokens)

    def run(
        self,
        layer: LaneLayer,
        stream: Stream,
        source: HiddenFile,
        target: HiddenFile,
        advance: Advance,
        observers: Observers | None = None,
    ) -> None:
        """Runs a stream's rows of `source` through `layer` into the same rows of `target`.

        `observers`, whose sites `layer` was built with, see every micro-batch, whichever rank runs it.
        """
        listening = observers or Observers()
        refused = out_of_range(layer.index, f"the {stream.name} set", stream.lane, self.dtype)
        with self.rows(self.ranks.own(stream.batches), source) as coming, RowWriter(target, refused) as writer:

            def forward(batch: MicroBatch) -> Sequence[Tensor]:
                rows = next(coming)
                output = layer(rows.view(batch.count, batch.length, -1)).reshape(rows.shape)
                writer.write(batch.first_row, output)
                return listening.collect()

            for batch, seen in self._each(stream.batches, forward):
                listening.add(seen)
                advance(batch.num_tokens / stream.num_tokens, batch.num_tokens)
            with self.ranks.as_one():
                writer.wait()

    def watch(self, layer: LaneLayer, batches: Sequence[MicroBatch], source: HiddenFile, observers: Observers) -> None:
        """Runs `batches` through `layer` for its observers' sake alone, up to `SeenEnoughError`."""
        with self.rows(self.ranks.own(batches), source) as coming:

            def forward(batch: MicroBatch) -> Sequence[Tensor]:
                look(layer, batch, next(coming))
                return observers.collect()

            for _, seen in self._each(batches, forward):
                observers.add(seen)

    def rows(
        self, batches: Iterable[MicroBatch], source: HiddenFile
    ) -> AbstractContextManager[Generator[Tensor, None, None]]:
        """The rows of `batches`, one micro-batch after the other, on this rank alone."""
        places = [(batch.first_row, batch.last_row) for batch in batches]
        return closing(read_rows(source, places, self.device))

    def _each(
        self, batches: Sequence[MicroBatch], work: Callable[[MicroBatch], Sequence[Tensor]]
    ) -> Iterator[tuple[MicroBatch, Sequence[Tensor]]]:
        """Every micro-batch with what `work` made of it, on one of the ranks."""
        return zip(batches, self.ranks.share(batches, work), strict=True)

    def relative_error(self, states: HiddenFile, name: str) -> Estimate:
        """Mean over tokens of ‖h_nvfp4 − h_bf16‖ / ‖h_bf16‖ between the two lanes' rows of set `name`.

        Per token, because a few tokens (the first of a sequence) carry norms thousands of times the others' and
        would drown them in a ratio of sums.
        """
        bf16, nvfp4 = self._lanes(name)

        def compare(batch: MicroBatch) -> Sequence[Tensor]:
            shift = nvfp4.first_row - bf16.first_row
            places = ((batch.first_row + by, batch.last_row + by) for by in (0, shift))
            h, other = (states.read(*span).to(self.device).double() for span in places)
            norm = h.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
            return (((other - h).norm(dim=1) / norm).cpu(),)

        ratios = [ratio.numpy() for _, (ratio,) in self._each(bf16.batches, compare)]
        return clustered_mean(np.concatenate(ratios), sequence_numbers(bf16))

    def fidelity(self, states: HiddenFile, name: str, advance: Advance) -> Fidelity:
        """Both lanes' next-token distributions on set `name`, from the last layer's hidden states."""
        bf16, nvfp4 = self._lanes(name)
        norm, targets = self.final_norm(), _next_tokens(bf16)

        def lane_states(stream: Stream, rows: slice) -> Tensor:
            first = stream.first_row
            final: Tensor = norm(states.read(first + rows.start, first + rows.stop).to(self.device))
            return final

        @torch.no_grad()
        def compare(span: slice) -> Sequence[Tensor]:
            def lanes(rows: slice) -> tuple[Tensor, Tensor]:
                here = slice(span.start + rows.start, span.start + rows.stop)
                return lane_states(bf16, here), lane_states(nvfp4, here)

            measures = compare_heads(lanes, targets[span].to(self.device), self.head_blocks(advance))
            return measures.to_tensors()

        shares = spans(bf16.num_tokens, ROWS, self.ranks.size)
        measures = HeadMeasures.joined(list(self.ranks.share(shares, compare)))
        return summarise(measures, sequence_numbers(bf16)[(targets >= 0).numpy()])

    def _lanes(self, name: str) -> tuple[Stream, Stream]:
        bf16, nvfp4 = self.stream(name, "bf16"), self.stream(name, "nvfp4")
        assert bf16 is not None and nvfp4 is not None
        return bf16, nvfp4

    def final_norm(self) -> nn.Module:
        """The norm before the head, with its weight."""
        norm = self.skeleton.new_final_norm()
        weight = self.source.read(f"{self.skeleton.architecture.final_norm}.weight").to(self.device)
        fill(norm, {"weight": weight}, self.dtype)
        return norm

    def head_blocks(self, advance: Advance) -> Iterator[Tensor]:
        """The head's weight in blocks of consecutive vocabulary rows, `[block, hidden]`."""
        architecture = self.skeleton.architecture
        owner = architecture.embedding if self.skeleton.tied_head else architecture.head
        info = self.source.tensors[f"{owner}.weight"]
        step = max(1, _HEAD_BLOCK_BYTES[self.device.type] // (info.shape[1] * self.dtype.itemsize))
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            block = self.source.read(info.name, slice(start, stop))
            yield block.to(self.device, self.dtype)
            advance((stop - start) / info.shape[0], 0)


def look(layer: LaneLayer, batch: MicroBatch, rows: Tensor) -> None:
    """Runs the `rows` of one micro-batch through `layer`, up to `SeenEnoughError`."""
    with suppress(SeenEnoughError):
        layer(rows.view(batch.count, batch.length, -1))


def out_of_range(layer: int, what: str, lane: Lane, dtype: torch.dtype) -> InputError:
    """What to raise where the hidden states of `what` after a layer hold NaN or Inf."""
    return InputError(
        f"layer {layer}: hidden states of {what} leave the range of {dtype} in the {lane} lane; "
        "try --compute-dtype float32, or check this layer's weights"
    )


def sequence_numbers(stream: Stream) -> np.ndarray:
    """For every row of a stream, the number of its sequence."""
    return np.repeat(np.arange(len(stream.sequences)), [len(sequence) for sequence in stream.sequences])


def _next_tokens(stream: Stream) -> Tensor:
    """For every row of a stream the token it predicts, int64; −1 for the last of a sequence."""
    shifted = [np.append(sequence[1:], -1) for sequence in stream.sequences]
    return torch.from_numpy(np.concatenate(shifted).astype(np.int64))
