"""`fourge compare`: two runs of the same benchmarks, item by item, from what lm-eval logged of them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourge.errors import InputError
from fourge.progress import announced

if TYPE_CHECKING:
    from fourge.evaluation.comparison import CountTokens, TaskComparison
    from fourge.evaluation.runs import Run
    from fourge.evaluation.statistics import Aggregate


@dataclass(frozen=True)
class CompareReport:
    """What `fourge compare` found; as JSON its keys are those of an evaluation's `evaluation.json`.

    RUN_A is the baseline, RUN_B the quantized model. `runs` says of each what it recorded of itself: path, model,
    engine, lm_eval, chat_template. `per_token` is there where both are lanes of one of our evaluations.
    """

    kind: str
    version: int
    runs: dict[str, dict[str, Any]]
    tasks: "list[TaskComparison]"
    macro: "Aggregate | None"
    item_weighted: "Aggregate | None"
    per_token: dict[str, Any] | None
    notes: tuple[str, ...]


def compare(
    run_a: Annotated[Path, typer.Argument(help="The baseline: a folder or file of lm-eval's logged samples.")],
    run_b: Annotated[Path, typer.Argument(help="The model to hold against it, likewise.")],
    *,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks or groups, lm-eval's names; commas or repeated [default: all].")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="The score to compare: METRIC, METRIC,FILTER or TASK=METRIC; repeated.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with a tokenizer.json, to count the tokens of generated answers.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as JSON too.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Write every item with both answers: .parquet or .jsonl.")
    ] = None,
) -> CompareReport:
    """Compare two runs of lm-eval, paired item by item: differences with their errors, recovery, flips.

    Reads the samples of `fourge evaluate` (DIR/baseline, DIR/quantized) and of lm-eval's --output_path with
    --log_samples, from any engine. Raises InputError for runs that were not asked the same questions in the same
    words.
    """
    from fourge.checkpoint.durable import write_json
    from fourge.evaluation.comparison import compare_runs
    from fourge.evaluation.pair_files import pair_file
    from fourge.evaluation.runs import open_run
    from fourge.evaluation.scores import parse_wishes

    paths = (Path(run_a), Path(run_b))
    for option, path in (("--output", output), ("--samples", samples)):
        if path is not None and not Path(path).parent.is_dir():
            raise InputError(f"{option} {path}: its folder is not there; make it, or name another")
    runs = (open_run(paths[0]), open_run(paths[1]))
    named = None if tasks is None else [name.strip() for text in tasks for name in text.split(",")]
    with (
        announced(f"Comparing {len(runs[0].samples)} and {len(runs[1].samples)} tasks"),
        nullcontext() if samples is None else pair_file(Path(samples)) as export,
    ):
        comparison = compare_runs(
            *runs,
            tasks=named,
            metrics=parse_wishes(metric or []),
            count_tokens=None if tokenizer is None else _token_counter(Path(tokenizer)),
            export=export,
        )
    report = CompareReport(
        kind="fourge-comparison",
        version=1,
        runs={"baseline": runs[0].described, "quantized": runs[1].described},
        tasks=comparison.tasks,
        macro=comparison.macro,
        item_weighted=comparison.item_weighted,
        per_token=_recorded_per_token(*paths),
        notes=_notes(runs),
    )
    if output is not None:
        write_json(Path(output), asdict(report))
    return report


def _token_counter(folder: Path) -> "CountTokens":
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"--tokenizer {folder}: no tokenizer.json in it; name the model's folder")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _recorded_per_token(first: Path, second: Path) -> dict[str, Any] | None:
    """KL and top-1 agreement, which samples do not hold: from the evaluation whose two lanes these are."""
    import json

    from fourge.evaluation.runs import ROLES

    recorded = first.parent / "evaluation.json"
    lanes = (first.name, second.name) == ROLES and first.resolve().parent == second.resolve().parent
    if not lanes or not recorded.is_file():
        return None
    per_token: dict[str, Any] | None = json.loads(recorded.read_text(encoding="utf-8"))["per_token"]
    return per_token


def _notes(runs: "Sequence[Run]") -> tuple[str, ...]:
    """What a reader should know of the two runs before he trusts a difference."""
    notes = [note for run in runs for note in run.notes]
    first, second = (run.described for run in runs)
    if _differ(first, second, "lm_eval"):
        notes.append(f"scored by lm-eval {first['lm_eval']} and {second['lm_eval']}: use one version for both")
    if _differ(first, second, "engine"):
        notes.append(f"run by {first['engine']} and {second['engine']}: part of a difference may be the engines'")
    return tuple(notes)


def _differ(first: Mapping[str, Any], second: Mapping[str, Any], key: str) -> bool:
    return None not in (first[key], second[key]) and first[key] != second[key]
