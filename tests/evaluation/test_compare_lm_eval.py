"""`fourge compare` on what lm-eval itself writes, of two pico models and of its model that answers at random."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import evaluate, write_tasks
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

import fourge
from fourge import CompareReport, InputError, compare
from fourge.evaluation.comparison import TaskComparison, compare_runs
from fourge.evaluation.runs import open_run, run_of_results
from fourge.report.evaluation_text import evaluation_summary

TASKS = ["plain", "subjects", "apart", "told", "last_word"]


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, task_files: Path, pico: Callable[..., Path]
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """`--output_path` folders of two different models, with lm-eval's results in memory."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, model in (("a", pico("llama")), ("b", pico("qwen3"))):
        results = evaluate(folder / name, task_files, TASKS, "hf", f"pretrained={model},dtype=float32,device=cpu")
        made[name] = (folder / name, results)
    return made


@pytest.fixture(scope="module")
def report(runs: dict[str, tuple[Path, dict[str, Any]]]) -> CompareReport:
    return compare(runs["a"][0], runs["b"][0])


def row(report: CompareReport, task: str) -> TaskComparison:
    return next(found for found in report.tasks if found.task == task)


def values(results: dict[str, Any], task: str, metric: str, filter_name: str = "none") -> list[float]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [float(sample[metric]) for sample in samples if sample["filter"] == filter_name]


def test_rows_are_tasks_and_groups_weighted_by_size(report: CompareReport) -> None:
    assert [found.task for found in report.tasks] == [
        *("other_first", "other_second", "last_word", "plain", "subjects", "told")
    ]


@pytest.mark.parametrize(
    ("task", "metric", "filter_name"),
    [("plain", "acc_norm", "none"), ("subjects", "acc", "none"), ("told", "exact_match", "strict-match")],
)
def test_scores_and_errors_are_lm_evals(
    report: CompareReport,
    runs: dict[str, tuple[Path, dict[str, Any]]],
    task: str,
    metric: str,
    filter_name: str,
) -> None:
    found = row(report, task)
    assert (found.metric, found.filter) == (metric, filter_name)
    for score, name in ((found.baseline, "a"), (found.quantized, "b")):
        recorded = runs[name][1]["results"][task]
        assert score is not None and score.se is not None
        assert score.score == pytest.approx(recorded[f"{metric},{filter_name}"], abs=1e-12)
        assert score.se == pytest.approx(float(recorded[f"{metric}_stderr,{filter_name}"]), rel=1e-9)


def test_the_paired_figures_are_those_of_the_samples(
    report: CompareReport, runs: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    found = row(report, "plain")
    y0, y1 = (np.array(values(runs[name][1], "plain", "acc_norm")) for name in "ab")
    b, c, n = int(((y0 == 1) & (y1 == 0)).sum()), int(((y0 == 0) & (y1 == 1)).sum()), len(y0)
    assert b and c  # else the models are too alike to test anything
    assert (found.only_baseline, found.only_quantized, found.items) == (b, c, n)
    assert found.delta is not None and found.recovery is not None
    assert found.delta.value == pytest.approx((c - b) / n)
    assert found.delta.se == pytest.approx(math.sqrt(b + c - (b - c) ** 2 / n) / n)
    assert found.mcnemar_p == pytest.approx(mcnemar([[0, b], [c, 0]], exact=True).pvalue)
    ratio = y1.mean() / y0.mean()
    assert found.recovery.value == pytest.approx(ratio)
    assert found.recovery.se == pytest.approx(math.sqrt(np.var(y1 - ratio * y0) / n) / y0.mean())


def test_a_group_is_all_its_items_with_errors_by_subject(
    report: CompareReport, runs: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    found = row(report, "subjects")
    subjects = ("first", "second", "third")
    differences = [
        np.array(values(runs["b"][1], s, "acc")) - np.array(values(runs["a"][1], s, "acc")) for s in subjects
    ]
    together = np.concatenate(differences)
    sums = [float((d - together.mean()).sum()) for d in differences]
    assert found.items == len(together) == 44
    assert found.delta is not None
    assert found.delta.value == pytest.approx(together.mean())
    assert found.delta.se == pytest.approx(math.sqrt(3 / 2 * sum(s * s for s in sums)) / 44)
    assert found.version == "2" and found.num_fewshot == 0


def test_chance_is_one_over_the_choices(report: CompareReport, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    found = row(report, "subjects")
    assert found.chance == pytest.approx((37 / 3 + 7 / 2) / 44)
    for found in (row(report, "plain"), row(report, "subjects")):
        assert found.baseline is not None and found.chance is not None
        right = round(found.baseline.score * found.items)
        p = binomtest(right, found.items, found.chance, alternative="greater").pvalue
        assert found.at_chance == (p >= 0.05)
        assert found.at_chance == ("cannot show damage" in (found.note or ""))
    assert row(report, "told").chance is None


def test_holm_is_over_the_tasks(report: CompareReport) -> None:
    tested = [found for found in report.tasks if found.mcnemar_p is not None]
    assert len(tested) == 5
    expected = multipletests([found.mcnemar_p for found in tested], method="holm")[1]
    assert [found.holm_p for found in tested] == pytest.approx(list(expected))


def test_means_are_over_the_measured_rows(report: CompareReport) -> None:
    paired = [found for found in report.tasks if found.delta is not None]
    assert report.macro is not None and report.item_weighted is not None
    assert report.macro.tasks == report.item_weighted.tasks == 5
    assert report.macro.quantized.score == pytest.approx(np.mean([f.quantized.score for f in paired if f.quantized]))
    right = sum(f.baseline.score * f.items for f in paired if f.baseline)
    assert report.item_weighted.baseline.score == pytest.approx(right / report.item_weighted.items)


def test_a_score_that_is_no_mean_is_an_empty_cell_that_says_why(report: CompareReport) -> None:
    found = row(report, "last_word")
    assert (found.baseline, found.quantized, found.delta, found.recovery, found.mcnemar_p) == (None,) * 5
    assert found.note is not None and "perplexity,none of last_word is better when lower" in found.note
    assert found.note in " ".join(evaluation_summary(report).split())


def test_generated_answers_are_counted(runs: dict[str, tuple[Path, dict[str, Any]]], pico: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico("llama"))
    report = compare(runs["a"][0], runs["b"][0], tasks=["told"], tokenizer=pico("llama"))
    generation = row(report, "told").generation
    assert generation is not None and generation.unit == "tokens"
    for lengths, name in ((generation.baseline, "a"), (generation.quantized, "b")):
        answers = [s["resps"][0][0] for s in runs[name][1]["samples"]["told"] if s["filter"] == "strict-match"]
        counts = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        assert lengths.mean_length == pytest.approx(np.mean(counts))
        assert lengths.truncated is not None and 0 < lengths.truncated <= 1
    plain = row(compare(runs["a"][0], runs["b"][0], tasks=["told"]), "told").generation
    assert plain is not None and (plain.unit, plain.baseline.truncated) == ("characters", None)


@pytest.mark.parametrize("metric", ["acc", "acc,none", "plain=acc"])
def test_another_metric(runs: dict[str, tuple[Path, dict[str, Any]]], metric: str) -> None:
    report = compare(runs["a"][0], runs["b"][0], tasks=["plain"], metric=[metric])
    found = row(report, "plain")
    assert found.metric == "acc" and found.baseline is not None
    assert found.baseline.score == pytest.approx(runs["a"][1]["results"]["plain"]["acc,none"])


def test_another_filter(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    report = compare(runs["a"][0], runs["b"][0], tasks=["told"], metric=["told=exact_match,flexible-extract"])
    found = row(report, "told")
    assert found.filter == "flexible-extract" and found.quantized is not None
    recorded = runs["b"][1]["results"]["told"]["exact_match,flexible-extract"]
    assert found.quantized.score == pytest.approx(recorded)


def test_results_in_memory_are_as_good_as_files(
    runs: dict[str, tuple[Path, dict[str, Any]]], report: CompareReport
) -> None:
    comparison = compare_runs(*(run_of_results(str(path), results) for path, results in runs.values()))
    from_files = compare_runs(*(open_run(path) for path, _ in runs.values()))
    assert comparison == from_files
    assert comparison.tasks == report.tasks


def test_a_model_beside_itself(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    report = compare(runs["a"][0], runs["a"][0], tasks=["plain,subjects"])
    for found in report.tasks:
        assert found.delta is not None and (found.delta.value, found.delta.se) == (0.0, 0.0)
        assert (found.only_baseline, found.only_quantized, found.mcnemar_p) == (0, 0, 1.0)


def test_a_model_that_answers_at_random(
    tmp_path: Path, task_files: Path, runs: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    answered = evaluate(tmp_path / "dummy", task_files, ["plain", "told"], "dummy")
    report = compare(runs["a"][0], tmp_path / "dummy")
    assert report.runs["quantized"]["engine"] == "dummy"
    assert "run by hf and dummy: part of a difference may be the engines'" in report.notes
    assert row(report, "plain").delta is not None
    told = row(report, "told")
    right = [sample["target"] == "l" for sample in answered["samples"]["told"] if sample["filter"] == "strict-match"]
    assert told.quantized is not None and told.quantized.score == pytest.approx(np.mean(right))  # it says "lol"
    assert told.generation is not None and told.generation.quantized.mean_length == 3
    only_here = row(report, "subjects")
    assert only_here.baseline is not None and only_here.quantized is None and only_here.delta is None
    assert only_here.note == "quantized: not measured"


@pytest.mark.parametrize(
    ("options", "tasks", "message"),
    [
        ({"num_fewshot": 1}, {}, "num_fewshot 0 and 1"),
        ({}, {"version": 2.0}, "task version 1.0 and 2.0"),
        ({}, {"question": "Say {{question}}"}, "the prompt of doc 0: from character 0 on"),
        ({"limit": 5}, {}, "30 and 5 items, doc 5 in one of them alone"),
        ({"apply_chat_template": True}, {}, "the chat template: none and "),
        ({"system_instruction": "ba be"}, {}, "the system instruction: none and "),
    ],
)
def test_runs_that_were_not_asked_the_same_are_refused(
    tmp_path: Path,
    runs: dict[str, tuple[Path, dict[str, Any]]],
    pico: Callable[..., Path],
    options: dict[str, Any],
    tasks: dict[str, Any],
    message: str,
) -> None:
    files = write_tasks(tmp_path / "tasks", **tasks)
    evaluate(tmp_path / "other", files, ["plain"], "hf", f"pretrained={pico('llama')},device=cpu", **options)
    with pytest.raises(InputError) as raised:
        compare(runs["a"][0], tmp_path / "other", tasks=["plain"])
    assert message in str(raised.value)
    assert str(raised.value).startswith("plain was not the same in")
    assert "\n" not in str(raised.value)


def test_samples_as_parquet_read_the_same(tmp_path: Path, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """The hub turns lm-eval's jsonl into parquet by itself; so does `datasets` here."""
    import datasets

    folder = next(path for path in runs["b"][0].iterdir() if path.is_dir())
    for file in folder.glob("samples_*.jsonl"):
        table = datasets.Dataset.from_json(str(file), cache_dir=str(tmp_path / "cache"))
        table.to_parquet(tmp_path / "parquet" / f"{file.stem}.parquet")
    for file in folder.glob("results_*.json"):
        (tmp_path / "parquet" / file.name).write_bytes(file.read_bytes())
    expected = compare(runs["a"][0], runs["b"][0], tasks=["plain", "subjects", "told"])
    assert compare(runs["a"][0], tmp_path / "parquet", tasks=["plain", "subjects", "told"]).tasks == expected.tasks


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_item_is_exported(tmp_path: Path, runs: dict[str, tuple[Path, dict[str, Any]]], suffix: str) -> None:
    import pyarrow.parquet

    path = tmp_path / f"pairs{suffix}"
    report = compare(runs["a"][0], runs["b"][0], tasks=["plain", "subjects", "told"], samples=path)
    rows = (
        pyarrow.parquet.read_table(path).to_pylist()
        if suffix == ".parquet"
        else [json.loads(line) for line in path.read_text().splitlines()]
    )
    assert len(rows) == 30 + 44 + 30
    for found in report.tasks:
        own = [r for r in rows if r["row"] == found.task]
        assert sum(r["baseline_right"] and not r["quantized_right"] for r in own) == found.only_baseline
        assert sum(r["quantized_right"] and not r["baseline_right"] for r in own) == found.only_quantized
    first = next(r for r in rows if r["task"] == "plain")
    sample = runs["a"][1]["samples"]["plain"][0]
    assert first["prompt"] == sample["arguments"][0][0]
    assert first["choices"] == [argument[1] for argument in sample["arguments"]]
    assert first["baseline_loglikelihoods"] == pytest.approx([r[0][0] for r in sample["resps"]])
    told = next(r for r in rows if r["task"] == "told")
    assert told["baseline_answer"] == runs["a"][1]["samples"]["told"][0]["resps"][0][0]
    assert told["baseline_loglikelihoods"] == [] and first["baseline_answer"] is None


def test_the_result_as_json(tmp_path: Path, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    report = fourge.compare(runs["a"][0], runs["b"][0], output=tmp_path / "compared.json")
    written = json.loads((tmp_path / "compared.json").read_text())
    assert written["kind"] == "fourge-comparison"
    assert written["tasks"][0]["delta"] == {"value": report.tasks[0].delta.value, "se": report.tasks[0].delta.se}
    assert evaluation_summary(written) == evaluation_summary(report)


def test_the_table_fits_and_shows_what_was_measured(report: CompareReport) -> None:
    text = evaluation_summary(report)
    assert all(len(line) <= 120 for line in text.splitlines() if "/" not in line)
    line = next(line for line in text.splitlines() if line.startswith("plain "))
    found = row(report, "plain")
    assert found.baseline is not None and found.baseline.se is not None and found.mcnemar_p is not None
    assert f"{100 * found.baseline.score:.2f} ± {100 * found.baseline.se:.2f}" in line
    assert f"{found.mcnemar_p:.4f}" in line
    assert line.split()[-2:] == [str(found.only_baseline), str(found.only_quantized)]
    assert "KL and top-1 agreement per token: not measured" in text
