"""`fourge compare` on folders written by hand: figures that can be checked on paper, and everything that is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from made_runs import generation_record, right_and_wrong, write_run
from typer.testing import CliRunner

from fourge import CompareReport, InputError, compare
from fourge.cli import app
from fourge.evaluation.scores import choose_score, parse_wishes
from fourge.report.evaluation_text import evaluation_summary

BASELINE = "1111111100"
QUANTIZED = "1111100010"
"""Three lost, one won, of ten."""


def lanes(folder: Path, baseline: str = BASELINE, quantized: str = QUANTIZED, **same: Any) -> CompareReport:
    first = write_run(folder / "a", {"quiz": right_and_wrong(baseline, **same)})
    second = write_run(folder / "b", {"quiz": right_and_wrong(quantized, **same)})
    return compare(first, second)


def test_figures_on_paper(tmp_path: Path) -> None:
    (quiz,) = lanes(tmp_path).tasks
    assert (quiz.metric, quiz.filter, quiz.items, quiz.version, quiz.num_fewshot) == ("acc", "none", 10, None, None)
    assert quiz.baseline is not None and quiz.quantized is not None and quiz.delta is not None
    assert (quiz.baseline.score, quiz.quantized.score) == (0.8, 0.6)
    assert (quiz.only_baseline, quiz.only_quantized) == (3, 1)
    assert quiz.delta.value == pytest.approx(-0.2)
    assert quiz.delta.se == pytest.approx((4 - 4 / 10) ** 0.5 / 10)
    assert quiz.recovery is not None and quiz.recovery.value == pytest.approx(0.75)
    assert quiz.mcnemar_p == quiz.holm_p == 0.625  # 2 · (1 + 4) / 2⁴
    assert quiz.chance == 0.25 and not quiz.at_chance and quiz.note is None


def test_the_text_of_it(tmp_path: Path) -> None:
    text = evaluation_summary(lanes(tmp_path))
    row = next(line for line in text.splitlines() if line.startswith("quiz "))
    # y₁ − ¾·y₀ is ¼ five times, −¾ three times, 1 and 0 once each: squares of 3.0, so √(0.3 / 10) / 0.8 = 0.2165.
    cells = ["10", "80.00 ± 13.33", "60.00 ± 16.33", "-20.00 ± 18.97", "75.00 ± 21.65", "0.6250", "0.6250", "3", "1"]
    assert row.split(maxsplit=1)[1].split() == " ".join(cells).split()
    assert "quiz: acc, chance 25.0%" in text
    assert "means: none" in text


def test_more_than_all_is_shown(tmp_path: Path) -> None:
    report = lanes(tmp_path, baseline="1111110000", quantized="1111111110")
    assert report.tasks[0].recovery is not None and report.tasks[0].recovery.value == pytest.approx(1.5)
    assert "150.00 ± " in evaluation_summary(report)


def test_nothing_is_rounded_before_it_is_compared(tmp_path: Path) -> None:
    """One item of 1,500, to the last digit."""
    pattern = "0" + "1" * 1499
    (quiz,) = lanes(tmp_path, baseline=pattern, quantized=pattern[:-1] + "0").tasks
    assert quiz.delta is not None and quiz.delta.value == pytest.approx(-1 / 1500, rel=1e-12)
    assert quiz.recovery is not None and quiz.recovery.value == pytest.approx(1498 / 1499, rel=1e-12)


def test_one_item_has_no_error_in_the_table(tmp_path: Path) -> None:
    text = evaluation_summary(lanes(tmp_path, baseline="1", quantized="0"))
    row = next(line for line in text.splitlines() if line.startswith("quiz "))
    assert row.split() == ["quiz", "1", "100.00", "0.00", "-100.00", "1.0000", "1.0000", "1", "0"]


def test_a_baseline_that_scores_nothing_has_no_recovery(tmp_path: Path) -> None:
    report = lanes(tmp_path, baseline="0000", quantized="0100")
    assert report.tasks[0].recovery is None
    text = evaluation_summary(report)
    assert "the baseline scores nothing: no recovery" in text


def test_a_baseline_at_chance_cannot_show_damage(tmp_path: Path) -> None:
    report = lanes(tmp_path, baseline="1100000", quantized="1100000")
    assert report.tasks[0].at_chance
    assert report.tasks[0].recovery is not None and report.tasks[0].recovery.value == 1
    text = evaluation_summary(report)
    assert "not above chance (25.0%" in text and "100.00" not in text, "the ratio of two guesses is no recovery"
    assert not lanes(tmp_path / "sure", baseline="1111110", quantized="1111110").tasks[0].at_chance


def test_shares_are_compared_without_flips(tmp_path: Path) -> None:
    first = [record | {"acc": 0.5 + 0.1 * i} for i, record in enumerate(right_and_wrong("0000"))]
    second = [record | {"acc": 0.4 + 0.1 * i} for i, record in enumerate(right_and_wrong("0000"))]
    report = compare(write_run(tmp_path / "a", {"mc2": first}), write_run(tmp_path / "b", {"mc2": second}))
    (mc2,) = report.tasks
    assert (mc2.only_baseline, mc2.only_quantized, mc2.mcnemar_p, mc2.holm_p, mc2.chance) == (None,) * 5
    assert mc2.delta is not None and mc2.delta.value == pytest.approx(-0.1)
    assert "no p, no flips" in evaluation_summary(report)


def test_a_task_of_one_run_alone_keeps_its_empty_cells(tmp_path: Path) -> None:
    both = right_and_wrong(BASELINE)
    first = write_run(tmp_path / "a", {"quiz": both, "other": both, "riddle": both})
    second = write_run(tmp_path / "b", {"other": both, "quiz": both, "story": both})
    report = compare(first, second)
    riddle, story = report.tasks[2], report.tasks[3]
    assert (riddle.task, riddle.quantized, riddle.delta, riddle.note) == (
        "riddle",
        None,
        None,
        "quantized: not measured",
    )
    assert (story.task, story.baseline, story.items, story.note) == ("story", None, 0, "baseline: not measured")
    assert report.macro is not None and report.macro.tasks == 2
    row = next(line for line in evaluation_summary(report).splitlines() if line.startswith("riddle "))
    assert row.split() == ["riddle", "80.00", "±", "13.33"]


def test_generation(tmp_path: Path, pico_tokenizer: Path) -> None:
    def told(answers: list[str]) -> list[dict[str, Any]]:
        return [generation_record(i, 1, answer) for i, answer in enumerate(answers)]

    first = write_run(tmp_path / "a", {"told": told(["ba be", "ba be bi bo"])})
    second = write_run(tmp_path / "b", {"told": told(["ba " * 8, "ba be bi bo bu da"])})
    (row,) = compare(first, second, tokenizer=pico_tokenizer).tasks
    assert row.generation is not None
    assert (row.generation.baseline.mean_length, row.generation.baseline.truncated) == (3.0, 0.0)
    # 8 tokens of at most 8, and 6, which is as near to it as a text that lost its last tokens would be.
    assert (row.generation.quantized.mean_length, row.generation.quantized.truncated) == (7.0, 1.0)
    assert row.chance is None
    text = evaluation_summary(compare(first, second, tokenizer=pico_tokenizer))
    assert "answers 3.0 and 7.0 tokens long on average, 0.00% and 100.00% cut off at the limit" in text


@pytest.fixture
def pico_tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_the_lanes_of_an_evaluation(tmp_path: Path) -> None:
    """KL and top-1 agreement are not in samples: they come from the evaluation whose lanes are compared."""
    estimate = {"mean": 0.0123, "standard_error": 0.0004, "tokens": 5}
    for role, pattern in (("baseline", BASELINE), ("quantized", QUANTIZED)):
        write_run(tmp_path / role, {"quiz": right_and_wrong(pattern)}, {})
    evaluation = {
        "engine": {"name": "walk", "numerics": "W4A4 emulated"},
        "models": {"baseline": {"name": "the-model"}, "quantized": {"name": "its-copy"}},
        "per_token": {"kl_div": estimate, "top1_agreement": estimate | {"mean": 0.97}},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    report = compare(tmp_path / "baseline", tmp_path / "quantized")
    assert report.per_token == evaluation["per_token"]
    assert (report.runs["quantized"]["model"], report.runs["quantized"]["engine"]) == (
        "its-copy",
        "walk, W4A4 emulated",
    )
    assert "0.0123 ± 0.0004 nats a token" in evaluation_summary(report)
    assert compare(tmp_path / "quantized", tmp_path / "baseline").per_token is None
    with pytest.raises(InputError, match=r"several models \(baseline, quantized\); name one of these folders"):
        compare(tmp_path, tmp_path / "quantized")


def test_of_several_runs_the_newest_counts(tmp_path: Path) -> None:
    stamps = ("2025-03-01T10-00-00.123456", "2025-03-02T09-00-00")
    for stamp, pattern in zip(stamps, (QUANTIZED, BASELINE), strict=True):
        write_run(tmp_path / "a", {f"quiz_{stamp}": right_and_wrong(pattern)})
        recorded = {"results": {"quiz": {"acc,none": 0.8 if pattern == BASELINE else 0.6}}, "versions": {"quiz": stamp}}
        (tmp_path / "a" / f"results_{stamp}.json").write_text(json.dumps(recorded))
    write_run(tmp_path / "b", {"quiz": right_and_wrong(QUANTIZED)})
    report = compare(tmp_path / "a", tmp_path / "b")
    (quiz,) = report.tasks
    assert quiz.baseline is not None and quiz.baseline.score == 0.8
    assert quiz.version == stamps[1]
    assert f"{tmp_path / 'a'} has several runs of quiz: the newest counts" in report.notes


def test_one_file_is_a_run_too(tmp_path: Path) -> None:
    lanes(tmp_path)
    report = compare(tmp_path / "a" / "samples_quiz.jsonl", tmp_path / "b")
    assert (report.tasks[0].only_baseline, report.tasks[0].only_quantized) == (3, 1)
    assert "not known to be complete" in report.notes[0]


def test_prompts_that_differ_in_later_choices_alone(tmp_path: Path) -> None:
    """lm-eval hashes the first request of an item: the others are looked at themselves."""
    records = right_and_wrong(BASELINE)
    records[4]["arguments"]["gen_args_2"]["arg_1"] = " another choice"
    first = write_run(tmp_path / "a", {"quiz": right_and_wrong(BASELINE)})
    with pytest.raises(InputError, match=r"^quiz was not the same in .*the choices of doc 4: from character 19 on"):
        compare(first, write_run(tmp_path / "b", {"quiz": records}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_hash": "another"}, "the prompt of doc 0"),
        ({"target": "1", "target_hash": "another"}, "the target of doc 0: from character 0 on '0' and '1'"),
    ],
)
def test_what_was_asked_must_agree(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    first = write_run(tmp_path / "a", {"quiz": right_and_wrong(BASELINE)})
    second = write_run(tmp_path / "b", {"quiz": right_and_wrong(BASELINE, **changes)})
    with pytest.raises(InputError, match=message):
        compare(first, second)


def test_generation_settings_must_agree(tmp_path: Path) -> None:
    def told(limit: int) -> dict[str, Any]:
        return generation_record(0, 1, "ba") | {
            "arguments": {"gen_args_0": {"arg_0": "Question 0", "arg_1": {"until": ["\n"], "max_gen_toks": limit}}}
        }

    first, second = write_run(tmp_path / "a", {"told": [told(8)]}), write_run(tmp_path / "b", {"told": [told(9)]})
    with pytest.raises(InputError, match="the generation settings of doc 0"):
        compare(first, second)


def test_samples_that_are_not_all_there(tmp_path: Path) -> None:
    results = {"n-samples": {"quiz": {"original": 99, "effective": 12}}}
    first = write_run(tmp_path / "a", {"quiz": right_and_wrong(BASELINE)}, results)
    with pytest.raises(InputError, match="10 samples of quiz, but its results count 12; evaluate again"):
        compare(first, first)


def test_scores_that_are_not_what_lm_eval_recorded(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {"quiz": right_and_wrong(BASELINE)}, {"results": {"quiz": {"acc,none": 0.9}}})
    (quiz,) = compare(first, first).tasks
    assert (quiz.baseline, quiz.note) == (
        None,
        "acc,none of quiz is not the mean over its items; choose another with --metric",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no samples in it"),
        ('{"doc_id": 0', r"samples_quiz.jsonl, line 1: damaged"),
        ('{"doc_id": 0}\n', r"samples_quiz.jsonl, line 1 is no sample of lm-eval \(KeyError\('arguments'\)\)"),
        ("3\n", r"samples_quiz.jsonl, line 1 is no sample of lm-eval"),
    ],
)
def test_damaged_samples(tmp_path: Path, content: str, message: str) -> None:
    folder = write_run(tmp_path / "a", {})
    (folder / "samples_quiz.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        compare(folder, folder)


def test_an_item_that_is_there_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"quiz": right_and_wrong("11") + right_and_wrong("1")})
    with pytest.raises(InputError, match="line 3: doc 0 is there twice"):
        compare(folder, folder)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "samples_quiz.parquet").write_text("not parquet")
    with pytest.raises(InputError, match=r"samples_quiz.parquet: damaged"):
        compare(tmp_path, tmp_path)


def test_damaged_results(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"quiz": right_and_wrong("11")})
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results.json: damaged"):
        compare(folder, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["quizz"]}, "quizz: neither run has samples of it; there are quiz"),
        ({"metric": ["f1"]}, "--metric f1: quiz has no such score; it has acc,none"),
        ({"metric": ["acc,strict"]}, "--metric acc,strict: quiz has no such score"),
        ({"metric": ["quiz="]}, "--metric quiz=: write METRIC, or TASK=METRIC"),
        ({"samples": Path("pairs.csv")}, r"--samples pairs.csv: name a file that ends in .jsonl or .parquet"),
        ({"output": Path("nowhere/x.json")}, "--output nowhere/x.json: its folder is not there"),
        ({"tokenizer": Path("nowhere")}, "--tokenizer nowhere: no tokenizer.json in it"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = write_run(tmp_path / "a", {"quiz": right_and_wrong("11")})
    with pytest.raises(InputError, match=message):
        compare(folder, folder, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("empty", "no samples_TASK.jsonl in it"),
        ("notes.txt", "a file of samples"),
    ],
)
def test_runs_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    folder = write_run(tmp_path / "a", {"quiz": right_and_wrong("11")})
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=message):
        compare(folder, tmp_path / name)


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {"quiz": right_and_wrong("11")})
    second = write_run(tmp_path / "b", {"quiz": right_and_wrong("111")})
    with pytest.raises(InputError, match="2 and 3 items"):
        compare(first, second, samples=tmp_path / "pairs.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_contexts_that_differ_share_a_prompt_of_whole_words(tmp_path: Path) -> None:
    """WinoGrande puts the choice into the context; what follows is the same."""
    contexts = [f"Ann thanked Eve since {name}" for name in ("Anna", "Anne")]
    arguments = {f"gen_args_{i}": {"arg_0": text, "arg_1": " had helped"} for i, text in enumerate(contexts)}
    records = right_and_wrong("1", choices=2, arguments=arguments)
    folder = write_run(tmp_path / "a", {"quiz": records})
    compare(folder, folder, samples=tmp_path / "pairs.jsonl")
    row = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert row["prompt"] == "Ann thanked Eve since "
    assert row["choices"] == ["Anna had helped", "Anne had helped"]


def test_long_names_have_a_line_of_their_own(tmp_path: Path) -> None:
    name = "a_task_whose_name_leaves_no_room_for_figures_in_one_line"
    folder = write_run(tmp_path / "a", {name: right_and_wrong(BASELINE), "quiz": right_and_wrong(QUANTIZED)})
    lines = evaluation_summary(compare(folder, folder)).splitlines()
    at = lines.index(name)
    assert lines[at + 1].split()[:2] == ["10", "80.00"]
    assert all(len(line) <= 120 for line in lines if "/" not in line)


def test_an_evaluation_is_shown_with_all_that_it_records(tmp_path: Path) -> None:
    """The content of an `evaluation.json`: what ran, how, what was shared, contamination, cost."""
    estimate = {"mean": 0.02, "standard_error": 0.001, "tokens": 900}
    evaluation = asdict(lanes(tmp_path)) | {
        "kind": "fourge-evaluation",
        "suite": "smoke",
        "engine": {
            "name": "walk",
            "numerics": "W4A4 emulated",
            "compute_dtype": "float32",
            "device": "cpu",
            "versions": {"fourge": "1.0", "lm_eval": "0.4.13"},
        },
        "models": {"baseline": {"name": "org/model", "path": "/m"}, "quantized": None},
        "settings": {
            "apply_chat_template": True,
            "fewshot_as_multiturn": False,
            "limit": 200,
            "thinking": None,
            "add_bos_token": None,
            "seed": 1234,
        },
        "per_token": {"kl_div": estimate, "top1_agreement": estimate | {"mean": 0.95}},
        "sharing": {"tokens_requested": 1000, "tokens_walked": 250},
        "drafting": {
            "quantized": {
                "drafted_by": "itself",
                "passes": 0,
                "verified": 0,
                "drafted": 0,
                "accepted": 0,
                "mean_accepted": None,
            },
            "baseline": {
                "drafted_by": "quantized",
                "passes": 3,
                "verified": 10,
                "drafted": 80,
                "accepted": 46,
                "mean_accepted": 4.6,
            },
        },
        "contamination": {"ngram": 13, "checked_against": "OUT", "items": {"quiz": 1}},
        "cost": {"seconds": 75.0, "peak_resident_bytes": 2_500_000_000, "bytes_read": 812_000_000_000},
        "notes": ["told was left out"],
    }
    del evaluation["runs"]
    text = evaluation_summary(evaluation)
    for said in (
        "baseline   org/model",
        "walk, W4A4 emulated, float32 on cpu",
        "fourge 1.0, lm_eval 0.4.13",
        "chat template yes, multi-turn shots no, limit 200, seed 1234",
        "KL(BF16‖NVFP4)   0.0200 ± 0.0010 nats a token",
        "250 tokens computed of 1,000 asked for (75% shared)",
        "quantized answers: decoded in memory, without passes over the weights",
        "baseline answers: 3 passes over the weights, drafted by the quantized model; mean accepted length 4.6 of 8.0",
        "WARNING: 1 items share 13 words in a row with OUT",
        "took 1m15s, peak memory 2.5 GB, 812.0 GB read",
        "note: told was left out",
    ):
        assert said in text
    assert "thinking" not in text and "quantized  " not in text.partition("task ")[0]


def test_the_suites_choose_their_scores() -> None:
    assert (
        choose_score("gsm8k", [("exact_match", "flexible-extract"), ("exact_match", "strict-match")])[1]
        == "strict-match"
    )
    assert choose_score("hellaswag", [("acc", "none"), ("acc_norm", "none")])[0] == "acc_norm"
    assert choose_score("mmlu", [("acc", "none")]) == ("acc", "none")
    assert choose_score("unheard_of", [("bleu", "none"), ("acc", "none")]) == ("acc", "none")
    assert choose_score("unheard_of", [("bleu", "none")]) == ("bleu", "none")
    assert parse_wishes(["acc", "gsm8k=exact_match,flexible-extract"]) == {
        "": "acc",
        "gsm8k": "exact_match,flexible-extract",
    }


def test_the_command(tmp_path: Path) -> None:
    lanes(tmp_path)
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    done = CliRunner().invoke(app, ["compare", *runs, "--output", str(tmp_path / "out.json")])
    assert done.exit_code == 0
    assert "recovery %" in done.output
    as_json = CliRunner().invoke(app, ["compare", *runs, "--json"])
    assert json.loads(as_json.stdout) == json.loads((tmp_path / "out.json").read_text())
    refused = CliRunner().invoke(app, ["compare", str(tmp_path), str(tmp_path / "b")])
    assert refused.exit_code == 2
    assert "several models" in refused.stderr
