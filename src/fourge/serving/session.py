"""One server from its start to its end: waited for, tried, left to run, and asked why if it died."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fourge.errors import InputError
from fourge.progress import format_seconds
from fourge.serving.api import ApiError, Client
from fourge.serving.failures import last_lines, likely_cause
from fourge.serving.server import Server, signals_passed_on
from fourge.serving.smoke import Comparison, Trial

_PROMPT = "Once upon a time"
_NEW_TOKENS = 16


@dataclass(frozen=True)
class Outcome:
    """`start_seconds` and `generated` are None where it never came up; `exit_code` is the server's, or the trial's."""

    exit_code: int
    start_seconds: float | None = None
    generated: str | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Session:
    """A server to be run; with a `trial`, for no longer than that takes."""

    command: list[str]
    variables: Mapping[str, str]
    client: Client
    model_name: str
    reach: str
    start_timeout: float
    trial: Trial | None

    def run(self) -> Outcome:
        """Until the server ends. Raises InputError where it dies while it starts, or does not generate."""
        began = time.monotonic()
        server = Server(self.command, self.variables)
        with signals_passed_on(server):
            try:
                if not server.wait_until_healthy(self.client, self.start_timeout):
                    return self._ended(server)
                return self._try(server, time.monotonic() - began)
            finally:
                server.stop()

    def _try(self, server: Server, seconds: float) -> Outcome:
        try:
            generated = self.client.generate(self.model_name, _PROMPT, _NEW_TOKENS)
            comparison = None if self.trial is None else self.trial.hold_against(self.client, self.model_name)
        except ApiError as error:
            if server.stopped_by is not None or server.has_ended():
                return self._ended(server)
            raise InputError(f"the server is up and does not generate: {error}; its log, above, says why") from error
        if comparison is not None:
            return Outcome(0 if comparison.agrees else 1, seconds, generated, comparison)
        print(
            f"serve: ready after {format_seconds(seconds)} at {self.client.url}/v1, for {self.reach}; it goes on from "
            f"{_PROMPT!r} with {generated!r}; Ctrl-C stops it",
            file=sys.stderr,
            flush=True,
        )
        return Outcome(server.wait(), seconds, generated)

    def _ended(self, server: Server) -> Outcome:
        """Before it was of use: because it was asked to, or because it died."""
        code = server.wait()
        if server.stopped_by is not None:
            return Outcome(code)
        print(f"serve: the server's last lines:\n{last_lines(server.lines)}", file=sys.stderr)
        cause = likely_cause(server.lines, code)
        raise InputError(
            f"the server died while it started (exit code {code}): "
            + (cause or "its last lines, above, say why; try the command of `fourge serve --print` by hand")
        )
