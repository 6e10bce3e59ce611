"""Sources that the `datasets` library reads: saved directories, and hub datasets with a stand-in for the network."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fourge.data import DataRequest, TokenSets, load_token_sets
from fourge.errors import InputError

Load = Callable[..., TokenSets]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def load(model: Callable[..., Path], request_for: Callable[..., DataRequest], vocab_size: int) -> Load:
    def run(source: object, **changes: Any) -> TokenSets:
        return load_token_sets(request_for(source, **changes), model(), vocab_size, None)

    return run


def dataset(*words: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"messages": [{"role": "user", "content": word}]} for word in words])


def taken(sets: TokenSets) -> list[list[int]]:
    return sorted(sequence.tolist() for sequence in sets.calibration.sequences)


def rendered(ids: Callable[[str], list[int]], *words: str) -> list[list[int]]:
    return sorted(ids(f"<user> {word} </s>") for word in words)


def test_a_saved_dataset(load: Load, ids: Callable[[str], list[int]], tmp_path: Path) -> None:
    dataset("w1", "w2").with_format("numpy").save_to_disk(tmp_path / "saved")
    sets = load(tmp_path / "saved", num_calibration_samples=2)
    assert taken(sets) == rendered(ids, "w1", "w2")
    assert sets.provenance["calibration"]["origin"]["kind"] == "saved dataset"
    with pytest.raises(InputError, match="leave ':train' out"):
        load(f"{tmp_path / 'saved'}:train")


@pytest.mark.parametrize(
    ("splits", "suffix", "expected"),
    [
        (["test", "train"], "", "train"),
        (["train", "train_sft"], "", "train_sft"),
        (["train", "test"], ":test", "test"),
    ],
)
def test_the_split_of_saved_datasets(
    load: Load, ids: Callable[[str], list[int]], tmp_path: Path, splits: list[str], suffix: str, expected: str
) -> None:
    words = {split: f"w{i}" for i, split in enumerate(splits)}
    datasets.DatasetDict({split: dataset(word) for split, word in words.items()}).save_to_disk(tmp_path / "saved")
    sets = load(f"{tmp_path / 'saved'}{suffix}")
    assert taken(sets) == rendered(ids, words[expected])
    assert sets.provenance["calibration"]["origin"]["split"] == expected


def test_a_split_that_is_not_there_names_those_that_are(load: Load, tmp_path: Path) -> None:
    datasets.DatasetDict({"a": dataset("w1"), "b": dataset("w2")}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="has neither of the splits train_sft and train; name one of a, b"):
        load(tmp_path / "saved")
    with pytest.raises(InputError, match="has no split c; name one of a, b"):
        load(f"{tmp_path / 'saved'}:c")


def test_a_directory_that_is_no_dataset(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}')
    with pytest.raises(InputError, match=f"--calibration {tmp_path}: a directory, but none .* name a file in it"):
        load(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The library's own parquet builder over local files in place of the download; gives what it was asked for."""
    files = {}
    for split, words in (("train_sft", ("w1", "w2")), ("train", ("w3",)), ("test", ("w4",))):
        files[split] = str(tmp_path / f"{split}.parquet")
        dataset(*words).to_parquet(files[split])
    original, asked = datasets.load_dataset_builder, {"files": files}

    def stand_in(name: str, config: str | None) -> Any:
        asked.update(name=name, config=config)
        builder = original("parquet", data_files=asked["files"], cache_dir=str(tmp_path / "cache"))
        builder.hash = REVISION
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    return asked


@pytest.mark.parametrize(
    ("source", "config", "split", "words"),
    [
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft", ["w1", "w2"]),
        ("HuggingFaceH4/ultrachat_200k:test", None, "test", ["w4"]),
        ("allenai/c4:en:train", "en", "train", ["w3"]),
    ],
)
def test_a_hub_dataset_with_its_configuration_split_and_revision(
    load: Load,
    ids: Callable[[str], list[int]],
    hub: dict[str, Any],
    source: str,
    config: str | None,
    split: str,
    words: list[str],
) -> None:
    sets = load(source, num_calibration_samples=len(words))
    assert taken(sets) == rendered(ids, *words)
    dataset_id = source.partition(":")[0]
    assert (hub["name"], hub["config"]) == (dataset_id, config)
    origin = sets.provenance["calibration"]["origin"]
    assert origin == {
        "kind": "hub",
        "dataset": dataset_id,
        "config": config,
        "split": split,
        "revision": REVISION,
        "records": len(words),
        "chat_template": True,
    }


def test_without_train_sft_it_is_train(load: Load, ids: Callable[[str], list[int]], hub: dict[str, Any]) -> None:
    del hub["files"]["train_sft"]
    assert taken(load("some/dataset")) == rendered(ids, "w3")


def test_a_hub_split_that_is_not_there(load: Load, hub: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--calibration some/dataset:dev: has no split dev; name one of train_sft, tr"):
        load("some/dataset:dev")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach it"), "the hub cannot be reached; name a local file"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'some/dataset' doesn't exist"),
            "no such dataset on the hub",
        ),
        (ValueError("Config name is missing.\nPlease pick one"), r"Config name is missing\. Please .*CONFIG:SPLIT"),
        (RuntimeError("Dataset scripts are no longer supported"), "Dataset scripts are no longer supported"),
    ],
)
def test_what_the_library_raises_becomes_one_line(
    load: Load, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=said) as caught:
        load("some/dataset")
    assert str(caught.value).startswith("--calibration some/dataset: ") and "\n" not in str(caught.value)


def test_offline_and_not_cached(tmp_path: Path) -> None:
    """In a process of its own, because the library reads the variable once."""
    code = (
        "from pathlib import Path; from fourge.data import DataRequest, load_token_sets\n"
        "from fourge.errors import InputError\n"
        "try: load_token_sets(DataRequest('HuggingFaceH4/ultrachat_200k', 1, 0, 8, 0), Path('.'), 100, None)\n"
        "except InputError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == (
        "--calibration HuggingFaceH4/ultrachat_200k: not in the cache of the datasets library, and HF_HUB_OFFLINE is "
        "set; name a local file (.jsonl, .json, .parquet or text), 'self' or 'random' instead\n"
    )


def test_without_the_library_the_extra_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fourge\[data\]', or name a local file .*'self' or 'random'"):
        load("HuggingFaceH4/ultrachat_200k")
