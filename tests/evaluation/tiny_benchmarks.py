"""The six tasks of the Open LLM Leaderboard in the hub's schema, a few rows each, in words that pico models know."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WORDS = [left + right for left in "bdfgkl" for right in ("a", "e", "i", "o", "u")]
MMLU_SUBJECTS = 57


class _Writer:
    """Sentences of known words, the same in every run."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def words(self, count: int) -> str:
        return " ".join(self.random.choice(WORDS) for _ in range(count))

    def number(self, below: int) -> int:
        return self.random.randrange(below)


def _arc(write: _Writer) -> Row:
    choices = {"text": [write.words(2 + i % 2) for i in range(4)], "label": ["A", "B", "C", "D"]}
    return {"id": write.words(1), "question": write.words(6), "choices": choices, "answerKey": "ABCD"[write.number(4)]}


def _gsm8k(write: _Writer) -> Row:
    return {"question": write.words(8), "answer": f"{write.words(5)}\n#### {write.number(90)}"}


def _hellaswag(write: _Writer) -> Row:
    return {
        "ind": write.number(100),
        "activity_label": write.words(2),
        "ctx_a": write.words(5),
        "ctx_b": write.words(2),
        "ctx": write.words(7),
        "endings": [write.words(3 + i) for i in range(4)],
        "source_id": write.words(1),
        "split": "val",
        "split_type": "indomain",
        "label": str(write.number(4)),
    }


def _mmlu(write: _Writer) -> Row:
    question = {"question": write.words(7), "subject": write.words(1)}
    return question | {"choices": [write.words(2) for _ in range(4)], "answer": write.number(4)}


def _truthfulqa(write: _Writer) -> Row:
    def targets(right: int) -> Row:
        answers = list(dict.fromkeys(write.words(3) for _ in range(5)))
        return {"choices": answers, "labels": [int(i < right) for i in range(len(answers))]}

    return {"question": write.words(6), "mc1_targets": targets(1), "mc2_targets": targets(2)}


def _winogrande(write: _Writer) -> Row:
    first, second = write.words(1), write.words(1)
    sentence = f"{write.words(4)} _ {write.words(3)}"
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(1 + write.number(2))}


Rows = Callable[[_Writer], Row]
DATASETS: dict[str, tuple[str, str | None, dict[str, int], Rows]] = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", {"train": 30, "validation": 4, "test": 9}, _arc),
    "gsm8k": ("openai/gsm8k", "main", {"train": 8, "test": 5}, _gsm8k),
    "hellaswag": ("Rowan/hellaswag", None, {"train": 14, "validation": 8}, _hellaswag),
    "truthfulqa_mc2": ("truthfulqa/truthful_qa", "multiple_choice", {"validation": 7}, _truthfulqa),
    "winogrande": ("allenai/winogrande", "winogrande_xl", {"train": 9, "validation": 8}, _winogrande),
}
"""By task: hub path, config, rows by split, and how a row is made. MMLU has 57 configs and is apart."""


def rows_of(task: str, split: str) -> list[Row]:
    """The rows of a split: always the same ones."""
    *_, sizes, make = DATASETS[task]
    write = _Writer(f"{task} {split}")
    return [make(write) for _ in range(sizes[split])]


def mmlu_rows(subject: str, split: str) -> list[Row]:
    """Five rows to draw shots from, two questions."""
    write = _Writer(f"{subject} {split}")
    return [_mmlu(write) for _ in range({"dev": 5, "test": 2}[split])]


def every_split(subjects: list[str]) -> Iterator[tuple[str, str | None, str, list[Row]]]:
    """Hub path, config, split and rows of everything."""
    for task, (path, config, sizes, _) in DATASETS.items():
        for split in sizes:
            yield path, config, split, rows_of(task, split)
    for subject in subjects:
        for split in ("dev", "test"):
            yield "cais/mmlu", subject, split, mmlu_rows(subject, split)


def write_jsonl(file: Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_as_jsonl(folder: Path, subjects: list[str]) -> None:
    """FOLDER/ORG/NAME/CONFIG/SPLIT.jsonl."""
    for path, config, split, rows in every_split(subjects):
        write_jsonl(folder / path / (config or "") / f"{split}.jsonl", rows)


def write_as_hub_repositories(folder: Path, subjects: list[str]) -> None:
    """ORG/NAME with a README whose front matter names each config's files, as a clone from the hub would be.

    The datasets library opens such folders by itself when the working directory is FOLDER: what our own mapping is
    compared with.
    """
    files: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for path, config, split, rows in every_split(subjects):
        name = f"files/{config or 'default'}-{split}.jsonl"
        write_jsonl(folder / path / name, rows)
        files.setdefault(path, {}).setdefault(config or "default", []).append((split, name))
    for path, configs in files.items():
        lines = ["---", "configs:"]
        for config, splits in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split, name in splits:
                lines += [f"  - split: {split}", f"    path: {name}"]
        (folder / path / "README.md").write_text("\n".join([*lines, "---", ""]))
