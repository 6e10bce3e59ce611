"""What a long run shows: one bar on a terminal, one plain line a step elsewhere; the facts also go to a JSON log."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

MEGA = 1e6


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The largest resident memory this process ever had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_seconds(seconds: float) -> str:
    """`45s`, `12m30s`, `3h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_bytes(count: float) -> str:
    """Decimal units, as disks and cards count: `812.0 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_binary(count: float) -> str:
    """Binary units, as memory is counted: `218.2 GiB`; `97.4 MiB` below one GiB."""
    gib = 1 << 30
    return f"{count / gib:,.1f} GiB" if abs(count) >= gib else f"{count / (1 << 20):,.1f} MiB"


_muted = False


def mute() -> None:
    """Leaves speaking, and the log, to another process of the same job, from now on."""
    global _muted
    _muted = True


class WalkProgress:
    """Progress of one walk of `num_steps` steps, of which `done` were committed before.

    `costs` says what the steps cost relative to each other (all the same where it is left out); the ETA follows
    from the cost of the steps finished in this run and the share of the one under way. `about` is in every entry of
    the log, which another process, on another machine, may continue.
    """

    def __init__(
        self,
        title: str,
        num_steps: int,
        done: int = 0,
        log: Path | None = None,
        stream: TextIO | None = None,
        costs: Sequence[float] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._title, self._num_steps, self._first = title, num_steps, done
        self._costs = [1.0] * num_steps if costs is None else list(costs)
        self._done, self._share = done, 0.0
        self._muted = _muted and stream is None
        self._stream = stream or sys.stderr
        self._log, self._about = None if self._muted else log, dict(about or {})
        self._began = time.monotonic()
        self._step_began, self._step_cpu = self._began, time.process_time()
        self._tokens, self._bytes = 0, 0
        self._step_tokens, self._step_bytes = 0, 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._stream.isatty() and not self._muted:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self._title, total=self._num_steps, completed=self._done, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end at this run's pace; None before anything was done."""
        under_way = self._share * sum(self._costs[self._done : self._done + 1])
        done = sum(self._costs[self._first : self._done]) + under_way
        if done <= 0:
            return None
        left = sum(self._costs[self._done :]) - under_way
        return (time.monotonic() - self._began) / done * left

    def advance(self, share: float, *, tokens: int = 0, read: int = 0) -> None:
        """Adds a share (0 to 1) of the step under way, tokens run through it and bytes read."""
        self._share = min(1.0, self._share + share)
        self._tokens += tokens
        self._bytes += read
        self._step_tokens += tokens
        self._step_bytes += read
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + self._share, facts=self._facts())

    def _facts(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        parts = [f"{self._done}/{self._num_steps}"]
        if self._tokens:
            parts.append(f"{self._tokens / seconds:,.0f} tok/s")
        parts.append(f"{self._bytes / seconds / MEGA:,.0f} MB/s")
        parts.append(f"RSS {format_bytes(resident_bytes())}")
        eta = self.eta_seconds
        parts.append("ETA …" if eta is None else f"ETA {format_seconds(eta)}")
        return " · ".join(parts)

    def finish_step(self, name: str, facts: str, record: dict[str, Any]) -> None:
        """Ends a step: a line for people, `record` with times and rates for the log."""
        now = time.monotonic()
        seconds = now - self._step_began
        cpu_now = time.process_time()
        cpu_seconds, self._step_cpu = cpu_now - self._step_cpu, cpu_now
        self._done, self._share, self._step_began = self._done + 1, 0.0, now
        line = f"{name}  {facts}  {format_seconds(seconds)}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, facts=self._facts())
            self._bar.console.print(line, highlight=False, markup=False)
        elif not self._muted:
            print(f"{self._title} {self._facts()} | {line}", file=self._stream, flush=True)
        if self._log is not None:
            entry = (
                record
                | self._about
                | {
                    "name": name,
                    "seconds": round(seconds, 4),
                    "cpu_seconds": round(cpu_seconds, 4),
                    "tokens": self._step_tokens,
                    "bytes_read": self._step_bytes,
                    "resident_bytes": resident_bytes(),
                    "peak_resident_bytes": peak_resident_bytes(),
                    "eta_seconds": self.eta_seconds,
                    "time": time.time(),
                }
            )
            with self._log.open("a") as file:
                file.write(json.dumps(entry, sort_keys=True) + "\n")
        self._step_tokens, self._step_bytes = 0, 0


@contextmanager
def announced(title: str, stream: TextIO | None = None) -> Iterator[None]:
    """Says what is being done and how long it took, for work whose length is not known beforehand."""
    if _muted and stream is None:
        yield
        return
    stream = stream or sys.stderr
    began = time.monotonic()
    print(f"{title} …", file=stream, flush=True)
    yield
    print(f"{title}: {format_seconds(time.monotonic() - began)}", file=stream, flush=True)
