"""A run of lm-eval on disk: which tasks it has samples of, and what it recorded beside them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourge.errors import InputError
from fourge.evaluation.samples import Source
from fourge.evaluation.scores import ScoreKey

ROLES = ("baseline", "quantized")
"""Folders of the two lanes in one of our evaluations."""
_STAMP = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"
_SAMPLES = re.compile(rf"samples_(?P<task>.+?)(?:_(?P<stamp>{_STAMP}))?\.(?:jsonl|parquet)")
_RESULTS = re.compile(rf".*?(?:_(?P<stamp>{_STAMP}))?\.json")


@dataclass(frozen=True)
class Run:
    """Samples of one model, by lm-eval's task name, and the results that lm-eval wrote with each task's.

    `results` lacks a task whose samples lie there alone. `engine` and `model` are those of the evaluation that a
    lane belongs to. `notes` say what a reader should know of the folder.
    """

    name: str
    samples: Mapping[str, Source]
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    engine: str | None = None
    model: str | None = None
    notes: tuple[str, ...] = ()

    def fact(self, task: str, key: str) -> Any:
        """What the run recorded of itself (`lm_eval_version`, `chat_template_sha`, …); None where it did not."""
        return self.results.get(task, {}).get(key)

    def task_fact(self, task: str, key: str) -> Any:
        """What it recorded of a task or group under `key` (`versions`, `n-shot`, …); None where it did not."""
        return (self._document(task).get(key) or {}).get(task)

    def recorded(self, task: str) -> dict[ScoreKey, float]:
        """lm-eval's own scores of a task or group, in its order; without their standard errors."""
        scores = {}
        for key, value in self._document(task).get("results", {}).get(task, {}).items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                scores[metric, filter_name] = float(value)
        return scores

    @property
    def groups(self) -> dict[str, list[str]]:
        """The names right below each group, as the newest results have them."""
        merged: dict[str, list[str]] = {}
        for document in sorted(self.results.values(), key=lambda document: float(document.get("date") or 0)):
            merged |= document.get("group_subtasks", {})
        return {name: members for name, members in merged.items() if members}

    def leaves(self, task: str) -> list[str]:
        """The tasks at and below a name."""
        return list(dict.fromkeys(_leaves(task, self.groups)))

    @property
    def described(self) -> dict[str, Any]:
        """Name, model, engine, lm-eval's version and the chat template, as far as recorded."""
        document: Mapping[str, Any] = next(iter(self.results.values()), {})
        config = document.get("config") or {}
        return {
            "path": self.name,
            "model": self.model or document.get("model_name"),
            "engine": self.engine or config.get("model"),
            "lm_eval": document.get("lm_eval_version"),
            "chat_template": document.get("chat_template_sha"),
        }

    def _document(self, task: str) -> Mapping[str, Any]:
        """The results that hold a task, or a group by the first of its tasks."""
        if task in self.results:
            return self.results[task]
        return next((self.results[leaf] for leaf in self.leaves(task) if leaf in self.results), {})


def run_of_results(name: str, results: Mapping[str, Any]) -> Run:
    """A run from what `lm_eval.simple_evaluate` returned with `log_samples`."""
    samples = results["samples"]
    return Run(name, samples, dict.fromkeys(samples, results))


def open_run(path: Path) -> Run:
    """A run from lm-eval's `--output_path`, from a lane of one of our evaluations, or from one file of samples.

    Of a task that a folder has several times, the newest counts. Raises InputError where there are no samples,
    and for a folder that has several models'.
    """
    if path.is_file():
        matched = _SAMPLES.fullmatch(path.name)
        if matched is None:
            raise InputError(
                f"{path}: a file of samples is called samples_TASK.jsonl or .parquet; name one, or a folder"
            )
        note = f"{path} is without its results: not known to be complete"
        return Run(str(path), {matched["task"]: path}, notes=(note,))
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; name the --output_path of an lm-eval run with --log_samples")
    folder = _folder_of_samples(path)
    newest: dict[str, tuple[str, Path]] = {}
    older = set()
    for file in sorted(folder.iterdir()):
        matched = _SAMPLES.fullmatch(file.name)
        if matched is None:
            continue
        task, stamp = matched["task"], matched["stamp"] or ""
        if task in newest:
            older.add(task)
        newest[task] = max(newest.get(task, ("", file)), (stamp, file))
    documents = _read_results(folder, {stamp for stamp, _ in newest.values()})
    alone = sorted(task for task, (stamp, _) in newest.items() if stamp not in documents)
    notes = [f"{path} has several runs of {task}: the newest counts" for task in sorted(older)]
    if alone:
        notes.append(f"{path} has no results beside the samples of {', '.join(alone)}: not known to be complete")
    engine, model = _of_evaluation(folder)
    return Run(
        name=str(path),
        engine=engine,
        model=model,
        samples={task: file for task, (_, file) in newest.items()},
        results={task: documents[stamp] for task, (stamp, _) in newest.items() if stamp in documents},
        notes=tuple(notes),
    )


def _of_evaluation(lane: Path) -> tuple[str | None, str | None]:
    """Engine and model of one of our lanes; None for any other folder."""
    recorded = lane.resolve().parent / "evaluation.json"
    if lane.resolve().name not in ROLES or not recorded.is_file():
        return None, None
    content = json.loads(recorded.read_text(encoding="utf-8"))
    engine = content["engine"]
    return ", ".join([engine["name"], engine["numerics"]]), content["models"][lane.resolve().name]["name"]


def _folder_of_samples(path: Path) -> Path:
    """`path` itself, or the one folder in it (lm-eval makes one a model) that has samples."""
    if _has_samples(path):
        return path
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _has_samples(folder)]
    if len(folders) == 1:
        return folders[0]
    if folders:
        names = ", ".join(folder.name for folder in folders)
        raise InputError(f"{path} has samples of several models ({names}); name one of these folders")
    raise InputError(f"{path}: no samples_TASK.jsonl in it; evaluate with lm-eval's --output_path and --log_samples")


def _has_samples(folder: Path) -> bool:
    return any(_SAMPLES.fullmatch(file.name) for file in folder.iterdir())


def _read_results(folder: Path, stamps: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """lm-eval's results by time stamp, "" for the ones without."""
    documents: dict[str, Mapping[str, Any]] = {}
    for file in sorted(folder.iterdir()):
        matched = _RESULTS.fullmatch(file.name)
        if matched is None or (matched["stamp"] or "") not in stamps:
            continue
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: damaged ({error}); evaluate again") from error
        if isinstance(document, dict) and "results" in document:
            documents[matched["stamp"] or ""] = document
    return documents


def _leaves(task: str, groups: Mapping[str, list[str]]) -> Iterable[str]:
    for member in groups.get(task, ()):
        yield from _leaves(member, groups)
    if task not in groups:
        yield task
