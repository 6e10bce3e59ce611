"""An evaluation's folder: lm-eval's samples and results of both models, and `evaluation.json`, written last."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourge.checkpoint.durable import replaced, write_json

EVALUATION = "evaluation.json"


def begin(folder: Path) -> None:
    """Makes the folder, and takes back that it holds a finished evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATION).unlink(missing_ok=True)


def write_lane(folder: Path, results: Mapping[str, Any]) -> None:
    """Replaces `folder` by one model's results: `samples_TASK.jsonl` as lm-eval logs them, and `results.json`."""
    from lm_eval.utils import handle_non_serializable

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for task, samples in results["samples"].items():
        with replaced(folder / f"samples_{task}.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for sample in samples:
                line = json.dumps(_as_logged(sample), default=handle_non_serializable, ensure_ascii=False)
                file.write(line + "\n")
    kept = {name: value for name, value in results.items() if name != "samples"}
    with replaced(folder / "results.json") as temporary:
        text = json.dumps(kept, default=handle_non_serializable, ensure_ascii=False, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def _as_logged(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A record in the form in which lm-eval's `--log_samples` writes it: numbers of answers as text."""
    from lm_eval.utils import sanitize_list

    return {
        **sample,
        "arguments": {f"gen_args_{i}": _numbered(arguments) for i, arguments in enumerate(sample["arguments"])},
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
        "target": str(sample["target"]),
    }


def _numbered(arguments: Sequence[Any]) -> dict[str, Any]:
    return {f"arg_{i}": argument for i, argument in enumerate(arguments)}


def finish(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `evaluation.json`: from here on the evaluation is finished."""
    write_json(folder / EVALUATION, content)
