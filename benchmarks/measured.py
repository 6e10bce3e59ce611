"""A process run to its end: what it took, and the last line that it printed."""

import os
import shlex
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_running: set[int] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Measured:
    """What a process took, and the last line that it printed. On a busy machine CPU seconds are the steadier ones."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    last_line: str


def run_measured(command: list[str], log: Path, timeout: float | None = None) -> Measured:
    """Runs a process to its end, its messages into `log`.

    Raises CalledProcessError where it fails, TimeoutExpired where it takes more than `timeout` seconds: then it is
    killed with all that it started.
    """
    began = time.monotonic()
    with log.open("a") as messages:
        messages.write(f"$ {shlex.join(command)}\n")
        messages.flush()
        # A session of its own, so that the processes that it starts end with it.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, start_new_session=True)
        assert process.stdout is not None
        with _lock:
            _running.add(process.pid)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _kill(process.pid)

        clock = threading.Timer(timeout or threading.TIMEOUT_MAX, expire)
        clock.daemon = True
        clock.start()
        try:
            output = process.stdout.read()
        except BaseException:
            # Left behind, it would go on writing where the next run of the same row writes.
            _kill(process.pid)
            raise
        finally:
            clock.cancel()
            with _lock:
                _running.discard(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        messages.write(output)
    seconds = time.monotonic() - began
    if expired.is_set():
        raise subprocess.TimeoutExpired(command, seconds)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Measured(seconds, cpu_seconds, usage.ru_maxrss * 1024, output.strip().splitlines()[-1])


def kill_running() -> None:
    """Ends every process that a `run_measured` of any thread waits for."""
    with _lock:
        for process in _running:
            _kill(process)


def _kill(process: int) -> None:
    """The process group goes with its leader; it may just have gone by itself."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        return
