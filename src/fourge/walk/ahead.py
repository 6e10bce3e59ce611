"""Between files and a GPU: threads read what comes next into pinned memory, and write behind, while it computes.

On a CPU there is nothing to gain: rows are read and written there when they are asked for.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from fourge.checkpoint.reader import Checkpoint
from fourge.errors import InputError
from fourge.walk.hidden import HiddenFile, checksum_rows
from fourge.walk.one_behind import OneBehind

T = TypeVar("T")

_AHEAD = 4
"""Reads at once: one thread brings from the page cache a seventh of what a GPU takes."""
_PIECE_BYTES = 64 << 20


def read_rows(
    file: HiddenFile, spans: Sequence[tuple[int, int]], device: torch.device
) -> Generator[Tensor, None, None]:
    """Rows `[start, stop)` of each of `spans`, in their order, on `device`. To be closed."""
    if device.type == "cpu":
        yield from (file.read(start, stop) for start, stop in spans)
        return
    for rows in _ahead(lambda span: file.read(*span, pinned=True), spans):
        # Pinned memory is handed out again once the copy from it is done: torch's allocator sees to that.
        yield rows.to(device, non_blocking=True)


def read_tensor(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    """Tensor `name` in its own dtype on `device`."""
    info = checkpoint.tensors[name]
    if device.type == "cpu" or info.nbytes < _PIECE_BYTES:
        return checkpoint.read(name).to(device)
    tensor = torch.empty(info.shape, dtype=info.torch_dtype, device=device)
    step = max(1, _PIECE_BYTES * info.shape[0] // info.nbytes)
    places = [slice(start, min(start + step, info.shape[0])) for start in range(0, info.shape[0], step)]
    pieces = _ahead(lambda rows: checkpoint.read(name, rows, pinned=True), places)
    for rows, piece in zip(places, pieces, strict=True):
        tensor[rows].copy_(piece, non_blocking=True)
    return tensor


def _ahead(work: Callable[[T], Tensor], items: Iterable[T]) -> Iterator[Tensor]:
    """`work` of every item, in their order, begun in threads before it is asked for."""
    coming: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(_AHEAD, "reading ahead") as threads:
        try:
            for item in items:
                coming.append(threads.submit(work, item))
                if len(coming) > _AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for unwanted in coming:
                unwanted.cancel()


class RowWriter:
    """Writes rows to `file`, from a GPU by a thread; raises `out_of_range` for rows that hold NaN or Inf.

    What the thread raises comes from a later `write`, or from `wait`, after which all that was written is in the file.
    """

    def __init__(self, file: HiddenFile, out_of_range: InputError) -> None:
        self._file = file
        self._out_of_range = out_of_range
        self._behind = OneBehind("hidden states")

    def __enter__(self) -> Self:
        self._behind.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._behind.__exit__(kind, error, trace)

    def write(self, start: int, rows: Tensor) -> None:
        """Puts `rows` `[n, width]` at `start`."""
        finite = torch.isfinite(rows).all()
        if not rows.is_cuda:
            self._require(finite)
            self._file.write(start, rows)
            return
        rows = rows.to(self._file.layout.dtype).contiguous()
        found = rows, finite, checksum_rows(rows)
        staged = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in found]
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(rows.device))
        self._behind.hand_over(partial(self._write, start, staged, copied))

    def wait(self) -> None:
        """Returns once everything is written."""
        self._behind.wait()

    def _write(self, start: int, staged: Sequence[Tensor], copied: torch.cuda.Event) -> None:
        copied.synchronize()
        rows, finite, checksum = staged
        self._require(finite)
        self._file.write(start, rows, int(checksum))

    def _require(self, finite: Tensor) -> None:
        if not finite:
            raise self._out_of_range
