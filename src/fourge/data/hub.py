"""Records through the `datasets` library: from the hub, or from a directory that it saved."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourge.data.records import Records
from fourge.errors import InputError

_HUB_SOURCE = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:]+)(?=:))?(:(?P<split>[^:]+))?")
_INSTEAD = "name a local file (.jsonl, .json, .parquet or text), 'self' or 'random' instead"
_PREFERRED_SPLITS = ("train_sft", "train")


def is_hub_source(source: str) -> bool:
    """Whether `source` reads `ORG/NAME`, `ORG/NAME:SPLIT` or `ORG/NAME:CONFIG:SPLIT`."""
    return _HUB_SOURCE.fullmatch(source) is not None


def load_hub_records(name: str, source: str) -> Records:
    """The records of a hub dataset, downloaded as far as the cache lacks it; messages call it `name`.

    Without a split it is `train_sft` where the dataset says that it has one, else `train`. Raises InputError where
    the library, the network, the dataset or the split is missing.
    """
    datasets = _import_datasets(name)
    matched = _HUB_SOURCE.fullmatch(source)
    assert matched is not None
    with _explained(name, datasets):
        builder = datasets.load_dataset_builder(matched["id"], matched["config"])
    if builder.info.splits:
        # Where the dataset's card lists its splits, a wrong one is refused before the download.
        _choose_split(name, matched["split"], list(builder.info.splits))
    with _explained(name, datasets):
        builder.download_and_prepare()
    split = _choose_split(name, matched["split"], list(builder.info.splits))
    origin = {
        "kind": "hub",
        "dataset": matched["id"],
        "config": matched["config"],
        "split": split,
        "revision": builder.hash,
    }
    return Records.counted(name, builder.as_dataset(split=split).with_format(None), origin)


@contextmanager
def _explained(name: str, datasets: Any) -> Iterator[None]:
    """Turns what the datasets library raises for a bad name or a missing network into InputError."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        yield
    except ConnectionError as error:
        why = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise InputError(f"{name}: not in the cache of the datasets library, and {why}; {_INSTEAD}") from error
    except DatasetNotFoundError as error:
        raise InputError(
            f"{name}: no such dataset on the hub, or it is private or gated; check the spelling, set HF_TOKEN, or "
            f"{_INSTEAD}"
        ) from error
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"{name}: the datasets library cannot load it ({_one_line(error)}); a configuration is chosen with "
            f"ORG/NAME:CONFIG:SPLIT; or {_INSTEAD}"
        ) from error


def load_saved_records(name: str, directory: Path, split: str | None) -> Records:
    """The records of a directory written by `save_to_disk`, of `split` where it has several."""
    datasets = _import_datasets(name)
    try:
        saved = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, LookupError) as error:
        raise InputError(
            f"{name}: a directory, but none that datasets' save_to_disk wrote ({_one_line(error)}); name a file in it"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        split = _choose_split(name, split, list(saved))
        saved = saved[split]
    elif split is not None:
        raise InputError(f"{name}: holds one dataset without splits; leave ':{split}' out")
    return Records.counted(name, saved.with_format(None), {"kind": "saved dataset", "split": split})


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name}: needs the datasets library, which is not installed; pip install 'fourge[data]', or {_INSTEAD}"
        ) from error
    return datasets


def _choose_split(name: str, asked: str | None, there: list[str]) -> str:
    chosen = asked or next((split for split in _PREFERRED_SPLITS if split in there), None)
    if chosen not in there:
        missing = f"no split {asked}" if asked else f"neither of the splits {' and '.join(_PREFERRED_SPLITS)}"
        raise InputError(f"{name}: has {missing}; name one of {', '.join(there)} after a colon")
    assert chosen is not None
    return chosen


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
