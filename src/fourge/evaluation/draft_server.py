"""Drafts from a server of the quantized model, where it does not fit in this process: it guesses, the walk decides.

The server may be busy, compute in other numerics, or hold another model: that costs passes, never a token.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property

from fourge.errors import InputError
from fourge.evaluation.draft_models import say_drafted
from fourge.evaluation.drafting import Answer
from fourge.evaluation.server_engine import ServedModel, ask_server
from fourge.serving.api import ApiError, Client
from fourge.serving.command import API_KEY

OPTION = "--quantized-url"
_LINES = 20
"""How often, in all, is said how far drafting is."""


@dataclass(frozen=True)
class DraftServer:
    """An OpenAI server as vLLM speaks it (it answers `return_token_ids`), asked `concurrency` questions at once."""

    url: str
    concurrency: int

    def require_ready(self) -> None:
        """Raises InputError where no server answers: better now than after a walk."""
        assert self._served

    def draft(self, answers: Sequence[Answer]) -> list[list[int]]:
        """How the served model goes on with each answer, greedily; InputError where the server fails."""
        self.require_ready()
        found: list[list[int]] = [[] for _ in answers]
        step = max(1, len(answers) // _LINES)
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            waiting = {pool.submit(self._continue, answer): number for number, answer in enumerate(answers)}
            for done, future in enumerate(as_completed(waiting), 1):
                found[waiting[future]] = future.result()
                if done % step == 0 or done == len(answers):
                    say_drafted("The server drafts", done, len(answers))
        except ApiError as error:
            raise InputError(f"{OPTION}: {error}; the same command goes on once it answers again") from error
        finally:
            # What was not asked yet is no use to anyone after a failure.
            pool.shutdown(cancel_futures=True)
        return found

    def _continue(self, answer: Answer) -> list[int]:
        room = self._served.max_length - len(answer.prefix)
        if room < 1:
            return []
        most = min(answer.left, room)
        return self._client.continue_tokens(self._served.name, answer.prefix, most, answer.question.until)

    @cached_property
    def _served(self) -> ServedModel:
        return ask_server(self.url, OPTION)

    @cached_property
    def _client(self) -> Client:
        return Client(self._served.endpoint.removesuffix("/v1/completions"), os.environ.get(API_KEY))
