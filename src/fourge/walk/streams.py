"""Which token sequences a walk runs through which lane, and where their hidden states lie in the file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Lane = Literal["bf16", "nvfp4", "nvfp4a16"]
"""The source; the checkpoint as an engine with NVFP4 arithmetic runs it; and as a weight-only one does, no input
rounded."""


@dataclass(frozen=True)
class MicroBatch:
    """`count` sequences of one `length`, side by side: no padding, so no mask and no row that is not a token."""

    first_row: int
    first_sequence: int
    count: int
    length: int

    @property
    def num_tokens(self) -> int:
        return self.count * self.length

    @property
    def last_row(self) -> int:
        return self.first_row + self.num_tokens


@dataclass(frozen=True)
class Stream:
    """One set of sequences in one lane. Its rows in every hidden-state file are `[first_row, last_row)`."""

    name: str
    lane: Lane
    sequences: tuple[np.ndarray, ...]
    batches: tuple[MicroBatch, ...]
    first_row: int
    last_row: int

    @property
    def num_tokens(self) -> int:
        return self.last_row - self.first_row

    def tokens(self, batch: MicroBatch) -> Tensor:
        """Token ids of a micro-batch, int64 `[count, length]`."""
        chosen = self.sequences[batch.first_sequence : batch.first_sequence + batch.count]
        return torch.from_numpy(np.stack(chosen).astype(np.int64))

    def spread_batches(self, tokens: int) -> tuple[MicroBatch, ...]:
        """Micro-batches from all over the stream, with about `tokens` tokens; all of them where it has no more."""
        every = len(self.batches)
        count = min(every, -(-every * tokens // self.num_tokens))
        return tuple(self.batches[i * every // count] for i in range(count))


def make_stream(
    name: str, lane: Lane, sequences: Iterable[np.ndarray], first_row: int, micro_batch_tokens: int
) -> Stream:
    """Lays sequences out from `first_row` on, longest first, in micro-batches of at most `micro_batch_tokens`.

    A single sequence longer than that is a micro-batch of its own. The sort is stable, so the same sequences give
    the same layout, and with it the same bits.
    """
    ordered = tuple(sorted(sequences, key=len, reverse=True))
    batches: list[MicroBatch] = []
    row, position = first_row, 0
    while position < len(ordered):
        length = len(ordered[position])
        most = max(1, micro_batch_tokens // length)
        count = 1
        while count < most and position + count < len(ordered) and len(ordered[position + count]) == length:
            count += 1
        batches.append(MicroBatch(row, position, count, length))
        row += count * length
        position += count
    return Stream(name, lane, ordered, tuple(batches), first_row, row)


def lay_out(sets: Sequence[tuple[str, Lane, Iterable[np.ndarray]]], micro_batch_tokens: int) -> tuple[Stream, ...]:
    """Streams one after the other in one file; sets without sequences are left out."""
    streams: list[Stream] = []
    row = 0
    for name, lane, sequences in sets:
        stream = make_stream(name, lane, sequences, row, micro_batch_tokens)
        if stream.batches:
            streams.append(stream)
            row = stream.last_row
    return tuple(streams)
