"""A walk's folder as every job has it: where the hidden states and the log lie, and that one process holds it."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from fourge.errors import InputError
from fourge.walk.hidden import HiddenLayout, checksum_file


class WalkPaths:
    """Where a walk keeps what; also for the ranks that take part in it and do not hold the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def manifest_path(self) -> Path:
        return self.folder / "job.json"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def hidden_temporary(self) -> Path:
        return self.folder / "hidden.tmp"

    def hidden_path(self, step: int) -> Path:
        """Where the hidden states lie that step `step` reads."""
        return self.folder / f"hidden-{step:05d}.bin"


class Held(WalkPaths):
    """A folder under an advisory lock, which ends with the process, however it ends."""

    _lock: int | None = None

    def _take_lock(self, refusal: str) -> None:
        """InputError, saying `refusal`, where another process has it."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(refusal) from None
        self._lock = descriptor

    @property
    def next_step(self) -> int:
        """The first one that is not committed."""
        raise NotImplementedError

    def _require_hidden(self, layout: HiddenLayout, checksum: int) -> None:
        """InputError where the hidden states that come next are not those that were committed with `checksum`."""
        path = self.hidden_path(self.next_step)
        require_committed(path, layout.nbytes, "checksum", lambda: checksum_file(path, layout), checksum)

    def discard(self) -> None:
        """Takes back a folder in which nothing was committed, and the output around it if that leaves it empty."""
        assert self.next_step == 0
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def close(self) -> None:
        """Gives the folder back. What is not committed is not cleaned up: the next run does that."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_committed(path: Path, size: int, kind: str, digest: Callable[[], object], committed: object) -> None:
    """InputError where a file is gone, has not `size` bytes, or its `digest`, of that `kind`, is not `committed`."""
    state = None
    if not path.is_file():
        state = "was committed and is gone"
    elif path.stat().st_size != size:
        state = f"has {path.stat().st_size} bytes, {size} were committed"
    elif digest() != committed:
        state = f"is not what was committed (its {kind} differs)"
    if state is not None:
        raise InputError(f"{path} {state}; the job cannot go on from here: start over with --restart")
