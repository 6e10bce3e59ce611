"""A thread that does one piece of work at a time, while its caller prepares the next."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class OneBehind:
    """A queue of length one: who hands over the next piece waits for the one before, and gets what it raised."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        self._under_way: Future[None] | None = None

    def hand_over(self, work: Callable[[], None]) -> None:
        """Begins `work` in the thread, once the one before is done."""
        self.wait()
        self._under_way = self._executor.submit(work)

    def wait(self) -> None:
        """Returns once nothing is under way; raises what the last piece raised."""
        if self._under_way is not None:
            done, self._under_way = self._under_way, None
            done.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets what is under way end. Where the caller raises, that is what is told, and not what the thread raised."""
        self._executor.shutdown()
        if error is None:
            self.wait()
