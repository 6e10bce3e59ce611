"""From names to lm-eval's tasks: which there are, what they read, and what of them cannot be run."""

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from fourge.errors import InputError
from fourge.evaluation.suites import Suite, SuiteTask, Thinking, known_folders
from fourge.evaluation.task_data import Need
from fourge.progress import announced

_INSTALL = "pip install 'fourge[eval]'"


_GROUP_KEYS = ("group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata")
_UNUSED_SHOTS: Mapping[str, Any] = {"training_split": None, "fewshot_split": None, "fewshot_config": None}


@dataclass(frozen=True)
class TaskChoice:
    """A task or group by lm-eval's name, and the keys of its task file that are replaced in it and all below it.

    `limit` is lm-eval's: the first items of every subject. An `optional` one is left out where local data lacks it.
    """

    task: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    optional: bool = False

    def without_shots(self) -> Self:
        """The same choice, not to draw examples from anywhere: for a task asked without shots."""
        return replace(self, overrides={**self.overrides, **_UNUSED_SHOTS})


def suite_choices(suite: Suite, thinking: Thinking | None) -> list[TaskChoice]:
    """The tasks of a suite that measure something in that thinking mode (None is off)."""
    mode = thinking or "off"
    return [_suite_choice(task, suite.generation.get(mode)) for task in suite.tasks if mode in task.thinking]


def _suite_choice(task: SuiteTask, generation: Mapping[str, Any] | None) -> TaskChoice:
    overrides = {**task.overrides, "num_fewshot": task.num_fewshot}
    if generation is not None and task.generates:
        overrides["generation_kwargs"] = generation
    return TaskChoice(task.task, overrides, task.limit, task.optional)


def import_lm_eval() -> Any:
    """lm-eval, it and `datasets` quietened to what goes wrong; InputError where it is not installed."""
    import logging

    try:
        import datasets
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(f"fourge evaluate needs lm-eval, which is not installed ({error}); {_INSTALL}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return lm_eval


@functools.cache
def _all_task_files(include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    with announced("Reading lm-eval's task files"):
        return TaskManager(include_path=include_path)


class TaskIndex:
    """lm-eval's task files, by name.

    Reading all of them takes a quarter of a minute, so it is done once, and where every name is one of our suites'
    only the folders that these lie in are read. `include_path` is a folder with more of them, which go before its own;
    InputError where it is none.
    """

    def __init__(self, names: Iterable[str], include_path: Path | None = None) -> None:
        if include_path is not None and not include_path.is_dir():
            raise InputError(f"--include-path {include_path}: no such folder; name one with lm-eval's task files")
        lm_eval = import_lm_eval()
        folders = known_folders()
        names = list(names)
        if include_path is None and all(name in folders for name in names):
            root = Path(lm_eval.tasks.__file__).parent
            self.manager = lm_eval.tasks.TaskManager(
                include_defaults=False, include_path=[root / folder for folder in sorted({folders[n] for n in names})]
            )
        else:
            self.manager = _all_task_files(include_path)

    def expand(self, names: Iterable[str]) -> list[str]:
        """Tasks and groups by these names, tags and patterns (`mmlu_*`) resolved; InputError for an unknown name."""
        resolved: list[str] = []
        for name in names:
            entry = self._entry(name)
            if entry is not None:
                resolved += sorted(entry.tags) if entry.kind.name == "TAG" else [name]
                continue
            matched = self.manager.match_tasks([name]) if "*" in name else []
            if not matched:
                close = difflib.get_close_matches(name, self.manager.all_tasks, 3)
                hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
                raise InputError(f"--tasks {name}: lm-eval has no such task; {hint}")
            resolved += self.expand(matched)
        return list(dict.fromkeys(resolved))

    def _entry(self, name: str) -> Any:
        return self.manager.task_index.get(name)

    def needs(self, choice: TaskChoice, num_fewshot: int | None = None) -> list[Need]:
        """What the tasks at and below `choice` read, in lm-eval's order, from their files alone.

        `num_fewshot` replaces the task's own as lm-eval's option does: not where it is 0.
        """
        leaves = self._leaves(choice.task, choice.overrides)
        return list(dict.fromkeys(_need(config, num_fewshot) for config in leaves))

    def _leaves(self, name: str, overrides: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Task files at and below a name, in lm-eval's order and with its rules of what overrides what."""
        entry = self._entry(name)
        if entry.kind.name == "TAG":
            for member in sorted(entry.tags):
                yield from self._leaves(member, overrides)
        elif entry.kind.name == "GROUP":
            yield from self._members(entry.cfg, overrides)
        else:
            yield {**entry.cfg, **overrides, "task": name}

    def _members(self, group: Mapping[str, Any], overrides: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Members of a group: names, or mappings that name a task or a group and override keys, or are a group."""
        overrides = {**_without(group, _GROUP_KEYS), **overrides}
        for member in group["task"]:
            if isinstance(member, str):
                yield from self._leaves(member, overrides)
                continue
            name = member.get("group") or member["task"]
            if self._entry(name) is not None:
                yield from self._leaves(name, {**overrides, **_without(member, ("task", "group"))})
            elif "group" in member:
                yield from self._members(member, overrides)
            else:
                yield {**overrides, **member}

    def build(self, choices: Sequence[TaskChoice]) -> list[Any]:
        """lm-eval's own Task and Group objects of `choices`, their data opened; to be made anew for every run.

        Raises InputError for what a task needs and this machine has not.
        """
        return [self._build_one(choice) for choice in choices]

    def _build_one(self, choice: TaskChoice) -> Any:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        # Not `manager.load`: it takes overrides for a task in a group's file only, and our groups have no file.
        factory, entries = self.manager._factory, self.manager.task_index
        try:
            return factory.build(self._entry(choice.task), overrides=deepcopy(dict(choice.overrides)), registry=entries)
        except ModuleNotFoundError as error:
            raise InputError(f"--tasks {choice.task}: needs {error.name}; pip install {error.name}") from error
        except (ConnectionError, DatasetsError, HfHubHTTPError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"--tasks {choice.task}: its data is not in the cache of the datasets library, nor did the hub give "
                f"it ({reason}); name local copies with --task-data, which --fetch-data makes on a connected machine"
            ) from error


def _without(mapping: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _need(config: Mapping[str, Any], num_fewshot: int | None) -> Need:
    own_shots = config.get("num_fewshot")
    shots = own_shots if num_fewshot is None or own_shots == 0 else num_fewshot
    path = None if "class" in config or config.get("custom_dataset") else config.get("dataset_path")
    items = config.get("test_split") or config.get("validation_split")
    return Need(
        config["task"], path, config.get("dataset_name"), str(items), _shots_split(config, str(items)), shots or 0
    )


def _shots_split(config: Mapping[str, Any], items: str) -> str | None:
    """Where lm-eval draws examples: as `ConfigurableTask.fewshot_docs` does."""
    of_shots = config.get("fewshot_config") or {}
    split = of_shots.get("split") or config.get("fewshot_split")
    if split is None and "samples" in of_shots:
        return None
    return split or config.get("training_split") or config.get("validation_split") or items
