"""vLLM's server as a process group of its own: its log passed on, its last lines kept, stopped cleanly."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from fourge.errors import InputError
from fourge.progress import format_seconds
from fourge.serving.api import Client

GRACE_SECONDS = 30.0
"""From a request to stop to the end by force."""
_KEPT_LINES = 400
_POLL_SECONDS = 0.25
_REPORT_SECONDS = 5.0


def require_free_port(host: str, port: int) -> None:
    """Raises InputError where a server could not bind to `host` and `port`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(f"port {port} of {host} is in use; choose another with --port") from error
            if error.errno == errno.EACCES:
                raise InputError(f"port {port} may not be used by this user; choose one above 1023") from error
            raise InputError(f"--host {host} is not an address of this machine ({error.strerror})") from error


class Server:
    """One run of the server. `stopped_by` is the signal that asked it to stop, None while nothing has.

    A stop is asked for once, with a signal to the whole group (vLLM is several processes); what is still there
    `grace` seconds later, or at the second request, is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: TextIO | None = None,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.stopped_by: int | None = None
        self._log = log or sys.stderr
        self._grace = grace
        self._deadline = float("inf")
        try:
            self._process = subprocess.Popen(
                command,
                env=os.environ | dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(
                f"{command[0]} cannot be run ({error.strerror}); name vLLM's Python by --vllm-python"
            ) from error
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            print(line, end="", file=self._log, flush=True)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; of one that a signal ended, 128 and the signal's number, as shells have it."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def has_ended(self, within: float = 2.0) -> bool:
        """Whether it has, or does `within` seconds: a connection breaks a moment before its process is gone."""
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def request_stop(self, signum: int) -> None:
        """Passes a signal on to the group; the second time, kills it. Returns at once."""
        again = self.stopped_by is not None
        self.stopped_by = signum
        self._deadline = min(self._deadline, time.monotonic() + self._grace)
        self._signal(signal.SIGKILL if again else signum)

    def wait(self, poll: float = _POLL_SECONDS) -> int:
        """Until it has ended, by itself or because it was asked to; the exit code."""
        while self.exit_code is None:
            if time.monotonic() > self._deadline:
                self._signal(signal.SIGKILL)
            try:
                self._process.wait(poll)
            except subprocess.TimeoutExpired:
                continue
        self._signal(signal.SIGKILL)  # workers that outlived their parent
        self._reader.join(timeout=5)
        assert self.exit_code is not None
        return self.exit_code

    def stop(self) -> int:
        """Ends it: SIGTERM, then, after the grace time, SIGKILL."""
        if self.exit_code is None and self.stopped_by is None:
            self.request_stop(signal.SIGTERM)
        return self.wait()

    def wait_until_healthy(self, client: Client, timeout: float) -> bool:
        """True once it answers; False where it ended or was asked to stop. Says every few seconds that it waits.

        Raises InputError, after stopping it, where it takes longer than `timeout` seconds.
        """
        began = reported = time.monotonic()
        while self.exit_code is None and self.stopped_by is None:
            if client.is_healthy():
                return True
            now = time.monotonic()
            if now - began > timeout:
                self.stop()
                raise InputError(
                    f"the server was not ready after {format_seconds(timeout)} and was stopped; "
                    "give it longer with --start-timeout"
                )
            if now - reported >= _REPORT_SECONDS:
                reported = now
                print(f"serve: starting, {format_seconds(now - began)}", file=self._log, flush=True)
            time.sleep(_POLL_SECONDS)
        return False

    def _signal(self, signum: int) -> None:
        try:
            os.killpg(self._process.pid, signum)
        except (ProcessLookupError, PermissionError):
            return  # it has ended; macOS says EPERM for a group of zombies


@contextmanager
def signals_passed_on(server: Server) -> Iterator[None]:
    """While it lasts, Ctrl-C and SIGTERM stop the server instead of this process."""

    def pass_on(signum: int, frame: FrameType | None) -> None:
        server.request_stop(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
