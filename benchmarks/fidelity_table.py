"""The results of `fidelity.py` as Markdown: a table a model, every KL beside that of `max`."""

import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "tool",
    "method",
    "KL, W4A4",
    "of `max`'s",
    "top-1 agreement",
    "perplexity / BF16's",
    "KL, W4A16",
    "of `max`'s",
    "seconds",
    "CPU seconds",
    "peak RSS",
)


def print_tables(results: Path) -> None:
    """Prints the tables of all models under `results`."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        print(f"\n**{folder.name}**\n\n{table(rows)}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows by falling KL, what failed last; says so where our `max`, the measure of all, is not among them."""
    done = [row for row in rows if "scores" in row]
    bases = [row["scores"] for row in done if row["tool"] == "fourge" and row["label"] == "max"]
    if not bases:
        return "`max` of ours is missing: run it first."
    done.sort(key=lambda row: -row["scores"]["W4A4"]["kl"][0])
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(_line(row, bases[0]) for row in done)]
    rest = ("",) * (len(COLUMNS) - 3)
    lines += [(row["tool"], row["label"], f"failed: {row['failed']}", *rest) for row in rows if "scores" not in row]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _line(row: dict[str, Any], base: dict[str, Any]) -> tuple[str, ...]:
    full, weights = row["scores"]["W4A4"], row["scores"]["W4A16"]
    label = f"`{row['label']}`" if row["tool"] == "fourge" else row["label"]
    extra = row["validation_tokens"]
    return (
        row["tool"],
        f"{label}, {extra:,} validation tokens besides" if extra else label,
        _with_error(full["kl"], 4),
        f"{full['kl'][0] / base['W4A4']['kl'][0]:.2f}",
        _with_error(full["top1"], 3),
        _with_error(full["perplexity_ratio"], 3),
        _with_error(weights["kl"], 4),
        f"{weights['kl'][0] / base['W4A16']['kl'][0]:.2f}",
        f"{row['seconds']:.0f}",
        f"{row['cpu_seconds']:.0f}",
        f"{row['peak_resident_bytes'] / 1e9:.2f} GB",
    )


def _with_error(measure: list[float], digits: int) -> str:
    value, error = (f"{number:.{digits}f}" for number in measure)
    return f"{value.removeprefix('0')} ± {error.removeprefix('0')}"
