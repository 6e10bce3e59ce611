"""One dataset on this disk: which splits a folder holds, in whichever form they were saved."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fourge.errors import InputError
from fourge.evaluation.raw_forms import RAW_FORMS, RawForm, read_rows

_SPLIT_FILE = re.compile(r"(?P<split>[A-Za-z_]+)(-\d{5}-of-\d{5})?\.(?P<kind>parquet|jsonl|json)")
_SPLIT_NAMES = {"val": "validation", "valid": "validation"}
_READERS = {"parquet": "parquet", "jsonl": "json", "json": "json"}


@dataclass(frozen=True)
class LocalDataset:
    """A folder and a way to open each split in it; opening gives a `datasets.Dataset`."""

    folder: Path
    splits: Mapping[str, Callable[[], Any]]


def open_folder(folder: Path, path: str, config: str | None) -> LocalDataset | None:
    """What `folder` holds of the hub dataset `(path, config)`; None where it is no dataset.

    Known are a tree of `save_to_disk`, of one or of all splits; parquet or jsonl files named by their split, as
    the hub names them (`test-00000-of-00001.parquet`) or plainly (`test.jsonl`), in the folder or in its `data/`;
    and the authors' own forms of `raw_forms`.
    """
    if not folder.is_dir():
        return None
    found = _saved(folder) or _files(folder) or _files(folder / "data") or _raw(folder, path, config)
    return LocalDataset(folder, found) if found else None


def _saved(folder: Path) -> dict[str, Callable[[], Any]]:
    state = folder / "state.json"
    if state.is_file():
        split = json.loads(state.read_text()).get("_split")
        return {split: partial(_from_disk, folder)} if split else {}
    return {child.name: partial(_from_disk, child) for child in sorted(folder.iterdir()) if _is_saved(child)}


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _from_disk(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"{folder}: not readable as a saved dataset ({error}); copy it again") from error


def _files(folder: Path) -> dict[str, Callable[[], Any]]:
    if not folder.is_dir():
        return {}
    files: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.iterdir()):
        matched = _SPLIT_FILE.fullmatch(file.name)
        if matched and not any(file.name == form.file for form in RAW_FORMS) and not _is_metadata(file):
            split = _SPLIT_NAMES.get(matched["split"], matched["split"])
            files.setdefault((split, _READERS[matched["kind"]]), []).append(file)
    return {split: partial(_from_files, reader, named) for (split, reader), named in files.items()}


def _is_metadata(file: Path) -> bool:
    return file.name in ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "manifest.json")


def _from_files(reader: str, files: list[Path]) -> Any:
    """Read by the `datasets` library's own readers, which give the types that the hub's copy would have."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    names = [str(file) for file in files]
    try:
        return load_dataset(reader, data_files={"only": names}, split="only")
    except (DatasetsError, ValueError, OSError) as error:
        raise InputError(f"{files[0]}: not readable as {reader} ({_cause(error)}); copy it again") from error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _raw(folder: Path, path: str, config: str | None) -> dict[str, Callable[[], Any]]:
    return {
        form.split: partial(_from_raw, form, folder / form.file)
        for form in RAW_FORMS
        if (form.path, form.config) == (path, config) and (folder / form.file).is_file()
    }


def _from_raw(form: RawForm, file: Path) -> Any:
    import datasets

    try:
        rows = [form.to_hub(row) for row in read_rows(file)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not in the form of {form.path}'s authors ({error!r}); fetch it again") from error
    return datasets.Dataset.from_list(rows)
