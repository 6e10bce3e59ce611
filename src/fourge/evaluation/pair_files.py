"""Every item of a comparison with both answers, a row each, in parquet or jsonl."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourge.checkpoint.durable import replaced
from fourge.errors import InputError
from fourge.evaluation.comparison import Export
from fourge.evaluation.pairing import Pair
from fourge.evaluation.samples import Item, import_parquet
from fourge.evaluation.scores import ScoreKey

SUFFIXES = (".jsonl", ".parquet")
_ROWS_AT_ONCE = 1024


def pair_row(row: str, key: ScoreKey, pair: Pair) -> dict[str, Any]:
    """One item as JSON.

    `row` is the task or group it counts in, `task` lm-eval's own. For each model: `MODEL_score`, `MODEL_right` (null
    where the score is not 0 or 1), `MODEL_loglikelihoods` of the choices, or the generated `MODEL_answer` and what
    the filter took from it, `MODEL_extracted`.
    """
    first = pair.baseline
    return {
        "row": row,
        "task": pair.task,
        "metric": key[0],
        "filter": key[1],
        "doc_id": first.doc_id,
        "prompt": first.prompt,
        "choices": list(first.choices),
        "target": first.target,
        **_answer("baseline", pair.baseline, key[0]),
        **_answer("quantized", pair.quantized, key[0]),
    }


def _answer(role: str, item: Item, metric: str) -> dict[str, Any]:
    score = float(item.values[metric])
    return {
        f"{role}_score": score,
        f"{role}_right": bool(score) if score in (0.0, 1.0) else None,
        f"{role}_loglikelihoods": list(item.loglikelihoods),
        f"{role}_answer": item.responses[0] if item.responses else None,
        f"{role}_extracted": item.extracted,
    }


def check_suffix(path: Path) -> None:
    """InputError unless the file's name says parquet or jsonl."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--samples {path}: name a file that ends in {' or '.join(SUFFIXES)}")


@contextmanager
def pair_file(path: Path) -> Iterator[Export]:
    """Gives what `compare_runs` takes as `export`; `path` is replaced at the end by all rows that it was given."""
    check_suffix(path)
    with replaced(path) as temporary, (_parquet if path.suffix == ".parquet" else _jsonl)(temporary) as export:
        yield export


@contextmanager
def _jsonl(path: Path) -> Iterator[Export]:
    with path.open("w", encoding="utf-8") as file:

        def export(row: str, key: ScoreKey, pairs: Sequence[Pair]) -> None:
            for pair in pairs:
                file.write(json.dumps(pair_row(row, key, pair), ensure_ascii=False) + "\n")

        yield export


@contextmanager
def _parquet(path: Path) -> Iterator[Export]:
    parquet = import_parquet(f"--samples {path.name}")
    import pyarrow

    text, number, numbers, flag = pyarrow.string(), pyarrow.float64(), pyarrow.list_(pyarrow.float64()), pyarrow.bool_()
    answer = {"score": number, "right": flag, "loglikelihoods": numbers, "answer": text, "extracted": text}
    schema = pyarrow.schema(
        {
            **dict.fromkeys(("row", "task", "metric", "filter"), text),
            "doc_id": pyarrow.int64(),
            "prompt": text,
            "choices": pyarrow.list_(text),
            "target": text,
            **{f"{role}_{name}": kind for role in ("baseline", "quantized") for name, kind in answer.items()},
        }
    )
    with parquet.ParquetWriter(path, schema) as writer:

        def export(row: str, key: ScoreKey, pairs: Sequence[Pair]) -> None:
            for start in range(0, len(pairs), _ROWS_AT_ONCE):
                rows = [pair_row(row, key, pair) for pair in pairs[start : start + _ROWS_AT_ONCE]]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))

        yield export
