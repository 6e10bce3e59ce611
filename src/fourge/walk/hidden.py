"""Hidden states between two layers: one file of rows, read and written a micro-batch at a time.

Plain reads and writes instead of a memory map: the page cache holds the same pages either way, but mapped ones
count as this process's memory, and the walk promises how much that is.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fourge.checkpoint.reader import byte_view
from fourge.walk.ranks import Ranks

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class HiddenLayout:
    """The shape of every hidden-state file of a walk: `rows` tokens of `width` values of `dtype`."""

    rows: int
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class HiddenFile:
    """An open hidden-state file. Rows are token positions; `read` and `write` move whole rows.

    Where several ranks write one, the first is to `create` it, and the others then open it to `join`.
    """

    def __init__(self, path: Path, layout: HiddenLayout, *, create: bool, join: bool = False) -> None:
        self.path = path
        self.layout = layout
        self._checksum = 0
        writing = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0)
        self._descriptor = os.open(path, writing if create or join else os.O_RDONLY, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int, *, pinned: bool = False) -> Tensor:
        """Rows `[start, stop)` as `[stop - start, width]` on the CPU; `pinned` for a GPU to copy from."""
        rows = torch.empty(stop - start, self.layout.width, dtype=self.layout.dtype, pin_memory=pinned)
        view = byte_view(rows)
        offset = start * self.layout.row_bytes
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            assert count > 0, f"{self.path} ended before row {stop}"
            view = view[count:]
            offset += count
        return rows

    def write(self, start: int, rows: Tensor, checksum: int | None = None) -> None:
        """Puts `rows` `[n, width]` at `start`; each row is to be written once, for the checksum adds them up.

        `checksum`: what `checksum_rows` gave, where it is known.
        """
        assert rows.shape[1] == self.layout.width
        view = byte_view(rows.to(device="cpu", dtype=self.layout.dtype).contiguous())
        self._checksum = (self._checksum + (checksum_bytes(view) if checksum is None else checksum)) % (1 << 64)
        offset = start * self.layout.row_bytes
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view = view[count:]
            offset += count

    def finish(self) -> int:
        """Makes what was written durable; returns the checksum of the rows that were written here."""
        os.fsync(self._descriptor)
        return self._checksum


def create_together(path: Path, layout: HiddenLayout, ranks: Ranks) -> HiddenFile:
    """A new file that all `ranks` write their rows into; called by each of them."""
    created = HiddenFile(path, layout, create=True) if ranks.first else None
    ranks.wait()
    return created or HiddenFile(path, layout, create=False, join=True)


def finish_together(file: HiddenFile, ranks: Ranks) -> int:
    """Returns, when every rank has forced its rows to disk, the checksum of all rows."""
    return sum(ranks.gather(file.finish())) % (1 << 64)


def checksum_bytes(data: memoryview) -> int:
    """Sum of the 32-bit words of `data`, whose length is a multiple of 4.

    Not a cryptographic digest: it is there to notice a truncated, zeroed or flipped page at the speed of memory
    (a SHA-256 of the hidden states would cost a GPU walk more than its arithmetic). It does not depend on the
    order in which micro-batches are written.
    """
    return int(np.frombuffer(data, np.uint32).sum(dtype=np.uint64))


def checksum_rows(rows: Tensor) -> Tensor:
    """`checksum_bytes` of contiguous `rows`, where they lie: int64 `[]`, the same modulo 2⁶⁴."""
    return (rows.view(torch.int32).long() & 0xFFFFFFFF).sum()


def checksum_file(path: Path, layout: HiddenLayout) -> int:
    """The checksum that `HiddenFile.finish` gave when the file was written."""
    rows = max(1, _BLOCK_BYTES // layout.row_bytes)
    total = 0
    with HiddenFile(path, layout, create=False) as file:
        for start in range(0, layout.rows, rows):
            block = file.read(start, min(start + rows, layout.rows))
            total += checksum_bytes(byte_view(block))
    return total % (1 << 64)
