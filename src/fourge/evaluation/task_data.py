"""Tasks' data without a hub: local folders answer what lm-eval asks of the `datasets` library.

lm-eval opens data in one place only, `datasets.load_dataset(path, name, …)`. Answering there leaves the tasks as they
are: splits, shots, `process_docs`, groups and their hashes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.errors import InputError
from fourge.evaluation.local_files import LocalDataset, open_folder

_ALSO_KNOWN_AS = {
    "cais/mmlu": ("hails/mmlu_no_train",),
    "baber/piqa": ("ybisk/piqa",),
    "truthfulqa/truthful_qa": ("truthful_qa", "truthfulqa"),
    "EleutherAI/lambada_openai": ("lambada",),
    "EleutherAI/drop": ("ucinlp/drop",),
}
"""The same questions under other names, on the hub or in their authors' repositories."""

_FOLDERS_OF_NO_CONFIG = ("", "none", "default", "plain_text")
_SOLE_CONFIGS = ("main", "default", "plain_text", "multiple_choice")
"""Configs that may lie in the dataset's own folder. A subject of MMLU may not: the folder would answer for all 57."""


@dataclass(frozen=True)
class Need:
    """What one of lm-eval's tasks reads: `path` and `config` as `load_dataset` is given them, and which splits.

    `shots_split` is where examples are drawn from; lm-eval opens it for no shots as well. `path` is None for a task
    whose own code makes or fetches its data.
    """

    task: str
    path: str | None
    config: str | None
    items_split: str
    shots_split: str | None
    num_fewshot: int

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that must be there, those of the items first."""
        return tuple(dict.fromkeys(split for split in (self.items_split, self.shots_split) if split is not None))

    @property
    def dataset(self) -> str:
        """The hub's dataset, and its config after a slash where it has several."""
        return f"{self.path}/{self.config}" if self.config else str(self.path)


class TaskData:
    """The folders of `--task-data`, asked in their order."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises InputError for a folder that is not there."""
        for folder in folders:
            if not folder.is_dir():
                raise InputError(
                    f"--task-data {folder}: no such folder; make one with --fetch-data where there is a hub"
                )
        self._folders = tuple(folders)
        self._known: dict[tuple[str, str | None], dict[str, Callable[[], Any]]] = {}

    def find(self, need: Need) -> LocalDataset | None:
        """The local copy of what `need` names, None where there is none; what it holds may still lack a split.

        Looked for as ORG/NAME, ORG__NAME or NAME, then CONFIG, or by the task's own name.
        """
        if need.path is None:
            return None
        for folder in _candidates(self._folders, need):
            found = open_folder(folder, need.path, need.config)
            if found is not None:
                return found
        return None

    def require(self, needs: Iterable[Need]) -> None:
        """Finds everything that `needs` names; InputError for the first dataset or split that is missing."""
        for need in needs:
            found = self.find(need)
            searched = ", ".join(map(str, self._folders))
            if found is None:
                raise InputError(
                    f"--task-data {searched}: nothing for task {need.task}: neither {need.dataset}/ nor "
                    f"{need.task}/ with {' and '.join(need.splits)}; --list-data says what is needed"
                )
            missing = [split for split in need.splits if split not in found.splits]
            if missing:
                raise InputError(
                    f"{found.folder}: holds {', '.join(found.splits)}, but task {need.task} also reads "
                    f"{' and '.join(missing)}; add {missing[0]}.jsonl or {missing[0]}.parquet there"
                )
            assert need.path is not None
            opened = self._known.setdefault((need.path, need.config), {})
            opened |= {split: found.splits[split] for split in need.splits}

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While this lasts, `datasets.load_dataset` answers from the folders: what `require` found, those splits."""
        import datasets

        of_the_hub = datasets.load_dataset
        readers = ("json", "parquet")

        def load_dataset(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
            if path in readers:
                return of_the_hub(path, name, *args, **kwargs)
            if (path, name) not in self._known:
                raise InputError(f"--task-data: lm-eval also opens {path} {name or ''}, which no task file names")
            return datasets.DatasetDict({split: open_split() for split, open_split in self._known[path, name].items()})

        datasets.load_dataset = load_dataset
        try:
            yield
        finally:
            datasets.load_dataset = of_the_hub


def _candidates(folders: Iterable[Path], need: Need) -> Iterator[Path]:
    assert need.path is not None
    names: list[str] = []
    for path in (need.path, *_ALSO_KNOWN_AS.get(need.path, ())):
        names += [path, path.replace("/", "__"), path.rpartition("/")[2]]
    for folder in folders:
        for name in dict.fromkeys(names):
            if need.config is None:
                yield from (folder / name / config for config in _FOLDERS_OF_NO_CONFIG)
                continue
            yield folder / name / need.config
            if need.config in _SOLE_CONFIGS:
                yield from (folder / name / config for config in _FOLDERS_OF_NO_CONFIG)
        yield folder / need.task
