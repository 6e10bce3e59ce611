"""Benchmarks in the form in which their authors publish them, turned into the hub's."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class RawForm:
    """A file of that name is `split` of the hub dataset `(path, config)`, once every row went through `to_hub`."""

    file: str
    path: str
    config: str | None
    split: str
    to_hub: Callable[[Row], Row]


def _truthfulqa(row: Row) -> Row:
    """A mapping from answer to 0 or 1 becomes the hub's two lists, in the same order."""
    targets = {name: row[name] for name in ("mc1_targets", "mc2_targets")}
    return {"question": row["question"]} | {
        name: {"choices": list(answers), "labels": list(answers.values())} for name, answers in targets.items()
    }


def _lambada(row: Row) -> Row:
    """LLM Foundry splits the passage before its last word; the hub has it whole."""
    return {"text": f"{row['context']} {row['continuation']}"}


RAW_FORMS = (
    RawForm("mc_task_v0.json", "truthfulqa/truthful_qa", "multiple_choice", "validation", _truthfulqa),
    RawForm("lambada_openai_llmfoundry.jsonl", "EleutherAI/lambada_openai", "default", "test", _lambada),
)


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON array, or of one JSON object a line."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        rows: list[Row] = json.loads(text)
        return rows
    # Not splitlines: a JSON string may hold U+2028 as it is.
    return [json.loads(line) for line in text.split("\n") if line.strip()]
