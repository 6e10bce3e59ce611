"""`--fetch-data DIR`: the data of tasks from the hub, as a folder that `--task-data` reads on a machine without one."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourge.checkpoint.durable import write_json
from fourge.errors import InputError
from fourge.evaluation.task_data import Need
from fourge.progress import announced

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FetchedDataset:
    """A dataset in the folder: its hub name, the commit it was taken from, and rows by split."""

    path: str
    config: str | None
    revision: str
    rows: dict[str, int]


def fetch_data(needs: Iterable[Need], directory: Path) -> list[FetchedDataset]:
    """Saves what `needs` name to `directory`, as ORG/NAME/CONFIG/SPLIT in the form of `save_to_disk`.

    Only the splits that are read. What an earlier run finished is kept; `manifest.json` is written after every
    dataset. Raises InputError for a task that has no hub dataset, and where the hub does not give one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fetched = {(entry.path, entry.config): entry for entry in read_manifest(directory)}
    for (path, config), splits in _by_dataset(needs).items():
        known = fetched.get((path, config))
        if known is not None and set(splits) <= known.rows.keys():
            continue
        named = f"{path}/{config}" if config else path
        with announced(f"Fetching {named}"):
            fetched[path, config] = _fetch(path, config, splits, directory)
        _write_manifest(directory, list(fetched.values()))
    return list(fetched.values())


def read_manifest(directory: Path) -> list[FetchedDataset]:
    """What an earlier run fetched into `directory`; nothing where there is no manifest."""
    path = directory / MANIFEST
    if not path.is_file():
        return []
    try:
        return [FetchedDataset(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["datasets"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); fetch into a new folder") from error


def _write_manifest(directory: Path, fetched: list[FetchedDataset]) -> None:
    write_json(directory / MANIFEST, {"kind": "fourge-task-data", "datasets": [asdict(entry) for entry in fetched]})


def _by_dataset(needs: Iterable[Need]) -> dict[tuple[str, str | None], list[str]]:
    wanted: dict[tuple[str, str | None], list[str]] = {}
    for need in needs:
        if need.path is None:
            raise InputError(f"--fetch-data: task {need.task} makes its data in its own code; leave it out")
        splits = wanted.setdefault((need.path, need.config), [])
        splits += [split for split in need.splits if split not in splits]
    return wanted


def _fetch(path: str, config: str | None, splits: list[str], directory: Path) -> FetchedDataset:
    revision, loaded = _from_hub(path, config)
    missing = [split for split in splits if split not in loaded]
    if missing:
        raise InputError(f"{path}: the hub's copy has no split {missing[0]}, but {', '.join(loaded)}; update lm-eval")
    folder = directory / path / config if config else directory / path
    for split in splits:
        shutil.rmtree(folder / split, ignore_errors=True)
        loaded[split].save_to_disk(str(folder / split))
    return FetchedDataset(path, config, revision, {split: len(loaded[split]) for split in splits})


def _from_hub(path: str, config: str | None) -> tuple[str, Any]:
    """The commit that the default branch stands at, and the dataset at that commit."""
    import datasets
    import huggingface_hub
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        revision = str(huggingface_hub.HfApi().dataset_info(path).sha)
        return revision, datasets.load_dataset(path, config, revision=revision)
    except (HfHubHTTPError, DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--fetch-data: the hub did not give {path} ({reason}); fetch on a connected machine, ask for access to a "
            "gated dataset, and run `hf auth login`"
        ) from error
