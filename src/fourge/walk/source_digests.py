"""SHA-256 of the source's files, taken on the way: a thread reads them, a layer ahead of the walk.

What it has read the walk finds in the page cache: so the disk is read once, and while the walk computes. The thread
holds one block, and goes no further than what the walk reads next, so that there is no need for the page cache to hold
more. How far it got changes nothing but the time: what it has not read at the end it reads then.
"""

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Self

from fourge.checkpoint.reader import Checkpoint
from fourge.progress import WalkProgress, format_bytes

_BLOCK_BYTES = 1 << 20  # stays in the cache between being read and being hashed
_LOOK_EVERY = 0.2  # seconds, at what is left at the end


class SourceDigests:
    """The digests of the files that hold `source`'s tensors; `steps` are the names that the walk reads, by step."""

    def __init__(self, source: Checkpoint, steps: Sequence[Sequence[str]]) -> None:
        self._reach = list(accumulate(sum(source.tensors[name].nbytes for name in names) for names in steps))
        wanted = [source.tensors[name].path for names in steps for name in names]
        files = dict.fromkeys([*wanted, *(info.path for info in source.tensors.values())])
        self._sizes = {path: path.stat().st_size for path in files}
        self._moved = Condition()
        self._read = self._allowed = 0
        self._stopped = False
        self._executor = ThreadPoolExecutor(1, "source digests")
        self._digests: dict[Path, Future[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify()
        self._executor.shutdown(cancel_futures=True)

    def begin(self, step: int) -> None:
        """The walk begins `step`: the thread, which the first call starts, may read what it and the next one need."""
        self._allow(self._reach[min(step + 1, len(self._reach) - 1)])

    def finish(self) -> dict[str, dict[str, Any]]:
        """`{name: {size, sha256}}` of every file; shows a bar for those that are not done by now."""
        self._allow(sys.maxsize)
        left = [path for path, digest in self._digests.items() if not digest.done()]
        with WalkProgress("source digests", len(left), costs=[float(self._sizes[path]) for path in left]) as progress:
            for path in left:
                self._watch(path, progress)
        return {path.name: {"size": size, "sha256": self._digests[path].result()} for path, size in self._sizes.items()}

    def _watch(self, path: Path, progress: WalkProgress) -> None:
        before = self._read
        while wait([self._digests[path]], timeout=_LOOK_EVERY).not_done:
            now = self._read
            progress.advance((now - before) / self._sizes[path], read=now - before)
            before = now
        self._digests[path].result()
        progress.finish_step(path.name, format_bytes(self._sizes[path]), {})

    def _allow(self, count: int) -> None:
        if not self._digests:
            self._digests = {path: self._executor.submit(self._digest, path) for path in self._sizes}
        with self._moved:
            self._allowed = count
            self._moved.notify()

    # In the thread

    def _digest(self, path: Path) -> str:
        digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            while self._may_go_on() and (count := file.readinto(block)):
                digest.update(memoryview(block)[:count])
                self._read += count
        return digest.hexdigest()

    def _may_go_on(self) -> bool:
        """Waits until the walk has come near enough; false where nobody wants the digests any more."""
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._read < self._allowed)
            return not self._stopped
