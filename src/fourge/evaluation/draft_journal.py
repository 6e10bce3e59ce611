"""What is known of a model's answers while they are made, on disk in one file that is replaced as a whole."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fourge.checkpoint.durable import write_json
from fourge.errors import InputError
from fourge.evaluation.scoring_job import require_same


class HasTokens(Protocol):
    """An answer: its token ids so far."""

    tokens: list[int]


@dataclass
class DraftState:
    """`drafts` are those of the pass under way, an answer that has not ended each; None before they are made.

    Over all passes, and all answers in each: `verified` answers, `drafted` tokens, of which `accepted` were right.
    `micro_batch_tokens` and `batch_rows` are what the first run chose, for the layout hangs on them. `drafted_by` is
    what drafts now: "itself", "quantized", "baseline", "server" or "look-up".
    """

    micro_batch_tokens: int
    batch_rows: int
    drafted_by: str = ""
    passes: int = 0
    verified: int = 0
    drafted: int = 0
    accepted: int = 0
    drafts: list[list[int]] | None = None


class DraftJournal:
    """The file `path`, new with the state that `begin` gives, or continued, which fills `answers` with their tokens.

    Raises InputError where it is of other questions or damaged.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, Any],
        answers: Sequence[HasTokens],
        begin: Callable[[], DraftState],
    ) -> None:
        self._path = path
        self._fingerprint = dict(fingerprint)
        if not path.exists():
            self.state = begin()
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            theirs, tokens, state = (stored[key] for key in ("fingerprint", "answers", "state"))
            drafts = state.pop("drafts")
            self.state = DraftState(**state, drafts=None if drafts is None else [_ids(text) for text in drafts])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); start over with --restart") from error
        require_same(path.parent, self._fingerprint, theirs)
        for answer, text in zip(answers, tokens, strict=True):
            answer.tokens[:] = _ids(text)

    def save(self, answers: Sequence[HasTokens]) -> None:
        """Replaces the file by the state and the answers so far."""
        drafts = None if self.state.drafts is None else [_text(draft) for draft in self.state.drafts]
        content = {
            "fingerprint": self._fingerprint,
            "answers": [_text(answer.tokens) for answer in answers],
            "state": asdict(self.state) | {"drafts": drafts},
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, content)


def _text(ids: Sequence[int]) -> str:
    """Token ids on one line, where JSON's indentation would give each its own."""
    return " ".join(map(str, ids))


def _ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]
