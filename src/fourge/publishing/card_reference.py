"""Scores from elsewhere, in a file of the owner's, and whether they were taken under our settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.errors import InputError

_EXAMPLE = (
    '{"name": "…", "source": "https://…", "settings": {"apply_chat_template": true}, "scores": {"gsm8k": '
    '{"score": 0.92, "metric": "exact_match", "filter": "strict-match", "num_fewshot": 5}}}'
)
_OF_THE_TASK = ("metric", "filter", "num_fewshot")
_OF_THE_RUN = ("apply_chat_template", "fewshot_as_multiturn", "limit", "thinking")


@dataclass(frozen=True)
class Reference:
    """Somebody's scores by task: each a table with `score`, a share of 1, and the settings that are known of it.

    `settings` are those of the whole run, under the names of `evaluation.json`; `source` says where they stand.
    """

    name: str
    source: str
    settings: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]]
    file: str

    def differences(self, task: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
        """Why this score and ours of `task` (as in `evaluation.json`) are not comparable; empty where they are."""
        theirs = self.scores[task["task"]]
        pairs = [(key, theirs, task.get(key)) for key in _OF_THE_TASK]
        pairs += [(key, self.settings, settings.get(key)) for key in _OF_THE_RUN]
        return [f"{key}: {_shown(key, there)}, here {ours}" for key, there, ours in pairs if _differs(key, there, ours)]


def read_reference(path: Path) -> Reference:
    """Reads `--reference FILE`; InputError where it is missing, malformed, or names no source."""
    mend = f"write it as {_EXAMPLE}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--reference {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--reference {path}: no JSON ({error}); {mend}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in ("name", "source")):
        raise InputError(f"--reference {path}: lacks the name or the source of the scores; {mend}")
    scores, settings = content.get("scores"), content.get("settings", {})
    if not isinstance(scores, dict) or not isinstance(settings, dict):
        raise InputError(f"--reference {path}: scores or settings are not tables; {mend}")
    for task, found in scores.items():
        value = found.get("score") if isinstance(found, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise InputError(f"--reference {path}: {task} has no score between 0 and 1; {mend}")
    return Reference(content["name"], content["source"], settings, scores, path.name)


def _differs(key: str, theirs: Mapping[str, Any], ours: Any) -> bool:
    # What was not said may have been anything; but no limit and no mode of thinking go without saying.
    if key not in theirs:
        return key not in ("limit", "thinking") or ours is not None
    return bool(theirs[key] != ours)


def _shown(key: str, theirs: Mapping[str, Any]) -> str:
    return str(theirs[key]) if key in theirs else "not told"
