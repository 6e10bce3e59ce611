"""`fourge evaluate` from beginning to end, on the leaderboard's six tasks in small: scores are lm-eval's own."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_benchmarks import rows_of, write_as_hub_repositories, write_as_jsonl

import fourge
from fourge.errors import InputError
from fourge.evaluation.suites import OPENLLM_V1

datasets = pytest.importorskip("datasets", reason="needs the datasets library; pip install 'fourge[eval]'")
pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'fourge[eval]'")

SETTINGS: dict[str, Any] = {"device": "cpu", "compute_dtype": "float32", "threads": 1}
SHORT = "max_gen_toks=16"
"""Answers of a random model have no end of their own, and its quantized copy seldom guesses how they go on."""
ROUNDING = {task.task: 1e-5 if task.task == "truthfulqa_mc2" else 0.0 for task in OPENLLM_V1.tasks}
"""Scores are equal; but for mc2's, which are probabilities and not right or wrong: those to FP32 rounding."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A pico model, its quantized copy, and the six benchmarks as local data and as clones from the hub."""

    model: Path
    quantized: Path
    data: Path
    clones: Path


@pytest.fixture(scope="module")
def bench(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    from fourge.evaluation.tasks import TaskChoice, TaskIndex

    root = tmp_path_factory.mktemp("bench")
    subjects = [str(need.config) for need in TaskIndex(["mmlu"]).needs(TaskChoice("mmlu"))]
    write_as_jsonl(root / "data", subjects)
    write_as_hub_repositories(root / "clones", subjects)
    model = pico("llama", max_position_embeddings=2048)
    fourge.quantize(
        str(model),
        root / "quantized",
        method="max",
        calibration="random",
        num_calibration_samples=4,
        num_probe_samples=0,
        max_seq_length=64,
        threads=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        # The datasets library keeps what it read of files: not in the user's cache.
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield Bench(model, root / "quantized", root / "data", root / "clones")


@pytest.fixture(scope="module")
def lm_evals_own(bench: Bench) -> dict[str, dict[str, Any]]:
    """lm-eval's results on the source by task: its `hf` model, its own opening of the data, a run for every task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(include_defaults=False, include_path=[root / task.folder for task in OPENLLM_V1.tasks])
    lm = HFLM(pretrained=str(bench.model), dtype="float32", device="cpu", batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bench.clones)
        return {
            task.task: lm_eval.simple_evaluate(
                model=lm,
                tasks=[task.task],
                num_fewshot=task.num_fewshot,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
                gen_kwargs=SHORT,
                task_manager=manager,
            )
            for task in OPENLLM_V1.tasks
        }


@pytest.fixture(scope="module")
def in_memory(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the suite evaluated by the `hf` engine."""
    folder = tmp_path_factory.mktemp("hf") / "evaluation"
    result = fourge.evaluate(
        bench.quantized,
        baseline=str(bench.model),
        suite="openllm-v1",
        engine="hf",
        gen_kwargs=SHORT,
        task_data=[bench.data],
        output=folder,
        **SETTINGS,
    )
    assert result.folders == [folder]
    assert result.evaluations == [json.loads((folder / "evaluation.json").read_text())]
    return folder


@pytest.fixture(scope="module")
def walked(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the suite evaluated by the walk."""
    from fourge.evaluation.benchmark import PromptOptions, choose_benchmark
    from fourge.evaluation.evaluation_run import Computing, EvaluationRun, Models
    from fourge.evaluation.task_data import TaskData

    folder = tmp_path_factory.mktemp("walk") / "evaluation"
    options = PromptOptions(None, None, None, SHORT, None)
    benchmark = choose_benchmark("openllm-v1", None, options, TaskData([bench.data])).with_data()
    EvaluationRun(
        benchmark=benchmark,
        models=Models(
            {"baseline": bench.model, "quantized": bench.quantized}, {"baseline": "source", "quantized": "ours"}
        ),
        computing=Computing("walk", "cpu", "float32", batch_size=8),
        thinking=None,
        folder=folder,
        metrics={},
        command="",
    ).run()
    return folder


def scores(results: dict[str, Any], task: str) -> dict[str, Any]:
    """Every score of a task or group, without standard errors."""
    return {key: value for key, value in results["results"][task].items() if "," in key and "stderr" not in key}


def logged(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_text().splitlines()]


def flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


def assert_same_answers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> None:
    """The same items and prompts; the same texts and greedy flags; log-likelihoods within the tolerance."""
    assert [s["doc_id"] for s in ours] == [s["doc_id"] for s in theirs]
    assert [s["prompt_hash"] for s in ours] == [s["prompt_hash"] for s in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for left, right in zip(flat(one["resps"]), flat(other["resps"]), strict=True):
            if isinstance(right, float):
                assert math.isclose(float(left), right, rel_tol=tolerance, abs_tol=tolerance)
            else:
                assert left == str(right)


@pytest.mark.parametrize("task", [task.task for task in OPENLLM_V1.tasks])
def test_hf_engine_on_local_data_is_lm_eval_on_clones(
    task: str, in_memory: Path, lm_evals_own: dict[str, dict[str, Any]]
) -> None:
    ours = json.loads((in_memory / "baseline" / "results.json").read_text())
    own = lm_evals_own[task]
    for name in own["results"]:
        assert scores(ours, name) == pytest.approx(scores(own, name), abs=ROUNDING[task], rel=0)
    for leaf, samples in own["samples"].items():
        assert ours["n-shot"][leaf] == own["n-shot"][leaf]
        assert_same_answers(logged(in_memory / "baseline", leaf), samples, tolerance=1e-5)


@pytest.mark.parametrize("task", [task.task for task in OPENLLM_V1.tasks])
def test_walk_engine_scores_are_lm_evals(task: str, walked: Path, lm_evals_own: dict[str, dict[str, Any]]) -> None:
    ours = json.loads((walked / "baseline" / "results.json").read_text())
    own = lm_evals_own[task]
    for name in own["results"]:
        assert scores(ours, name) == pytest.approx(scores(own, name), abs=ROUNDING[task], rel=0)
    for leaf, samples in own["samples"].items():
        assert_same_answers(logged(walked / "baseline", leaf), samples, tolerance=2e-4)


def test_what_is_recorded(in_memory: Path, walked: Path, bench: Bench) -> None:
    content = json.loads((in_memory / "evaluation.json").read_text())
    assert [row["task"] for row in content["tasks"]] == [task.task for task in OPENLLM_V1.tasks]
    for row, task in zip(content["tasks"], OPENLLM_V1.tasks, strict=True):
        assert (row["metric"], row["filter"]) == (task.metric, task.filter)
    counts = {row["task"]: row["items"] for row in content["tasks"]}
    assert counts == {
        "arc_challenge": 9,
        "gsm8k": 5,
        "hellaswag": 8,
        "mmlu": 114,
        "truthfulqa_mc2": 7,
        "winogrande": 8,
    }
    assert content["suite"] == "openllm-v1" and content["machine"]["cpus"] > 0
    assert content["engine"]["name"] == "hf" and content["engine"]["numerics"] == "W4A4 emulated"
    assert content["models"]["quantized"] == {"name": str(bench.quantized), "path": str(bench.quantized)}
    assert content["settings"]["apply_chat_template"] and content["settings"]["fewshot_as_multiturn"]
    assert content["command"].startswith(f"fourge evaluate {bench.quantized} --baseline {bench.model} --suite")
    assert content["per_token"] is None and content["sharing"] is None
    walk = json.loads((walked / "evaluation.json").read_text())
    assert walk["engine"]["name"] == "walk"
    assert walk["per_token"]["kl_div"]["mean"] > 0
    assert walk["sharing"]["tokens_walked"] < walk["sharing"]["tokens_requested"]
    assert walk["drafting"]["baseline"]["passes"] > 0 == walk["drafting"]["quantized"]["passes"]
    (gsm8k,) = [row for row in walk["tasks"] if row["task"] == "gsm8k"]
    of_samples = np.mean([sample["truncated"][0] for sample in logged(walked / "baseline", "gsm8k")])
    assert gsm8k["generation"]["baseline"]["truncated"] == of_samples


def test_compare_reads_the_folder(in_memory: Path) -> None:
    report = fourge.compare(in_memory / "baseline", in_memory / "quantized")
    rows = json.loads((in_memory / "evaluation.json").read_text())["tasks"]
    assert {row.task: dataclasses.asdict(row)["delta"] for row in report.tasks} == {r["task"]: r["delta"] for r in rows}


def test_one_model_alone(bench: Bench, tmp_path: Path) -> None:
    options = SETTINGS | {"tasks": ["arc_challenge,winogrande"], "limit": 3, "task_data": [bench.data]}
    alone = fourge.evaluate(baseline=str(bench.model), output=tmp_path / "source", **options).evaluations[0]
    other = fourge.evaluate(bench.quantized, **options)
    assert alone["models"]["quantized"] is None and other.evaluations[0]["models"]["baseline"] is None
    assert other.folders == [bench.quantized / ".fourge" / "evaluate" / "arc_challenge+winogrande"]
    for row in alone["tasks"]:
        assert row["baseline"]["score"] is not None and row["quantized"] is None and row["delta"] is None
    for row in other.evaluations[0]["tasks"]:
        assert row["quantized"]["score"] is not None and row["baseline"] is None and row["delta"] is None
    assert alone["macro"] is None
    assert len(logged(tmp_path / "source" / "baseline", "arc_challenge")) == 3


def test_shots_and_template_are_lm_evals_options(bench: Bench, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fourge.cli import app

    words = ["evaluate", "--baseline", str(bench.model), "--tasks", "hellaswag", "--num_fewshot", "2"]
    words += ["--apply_chat_template", "--task-data", str(bench.data), "--output", str(tmp_path), "--threads", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "evaluation.json").read_text())["settings"]
    assert settings["num_fewshot"] == 2
    assert settings["apply_chat_template"] and settings["fewshot_as_multiturn"]
    prompt = logged(tmp_path / "baseline", "hellaswag")[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("<user>") == 3 and prompt.count("<s>") == 1


def test_a_suites_own_limits(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourge.evaluation import suites

    few = dataclasses.replace(
        OPENLLM_V1, tasks=tuple(dataclasses.replace(t, limit=2) for t in OPENLLM_V1.tasks if t.task == "winogrande")
    )
    monkeypatch.setattr(suites, "SUITES", {"few": few})
    options = SETTINGS | {"baseline": str(bench.model), "suite": "few", "task_data": [bench.data]}
    fourge.evaluate(output=tmp_path / "own", **options)
    fourge.evaluate(output=tmp_path / "given", limit=5, **options)
    assert [s["doc_id"] for s in logged(tmp_path / "own" / "baseline", "winogrande")] == [0, 1]
    assert [s["doc_id"] for s in logged(tmp_path / "given" / "baseline", "winogrande")] == [0, 1, 2, 3, 4]


SWITCH = "{% if thinking %}w9{% endif %}"


def test_thinking_goes_through_the_template(
    bench: Bench, tmp_path: Path, pico: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    model = shutil.copytree(bench.model, tmp_path / "thinker")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + SWITCH)
    result = fourge.evaluate(
        baseline=str(model),
        tasks=["arc_challenge"],
        apply_chat_template=True,
        thinking="both",
        limit=2,
        task_data=[bench.data],
        output=tmp_path / "results",
        **SETTINGS,
    )
    assert [content["settings"]["thinking"] for content in result.evaluations] == ["off", "on"]
    prompts = {}
    for folder in result.folders:
        sample = logged(folder / "baseline", "arc_challenge")[0]
        prompts[folder.name] = sample["arguments"]["gen_args_0"]["arg_0"]
    assert prompts["thinking-on"] == prompts["thinking-off"] + "w9"


def test_without_the_calibration_tokens_nothing_is_said_to_be_checked(bench: Bench, tmp_path: Path) -> None:
    import shutil

    from fourge.report.evaluate_text import evaluate_summary

    published = shutil.copytree(bench.quantized, tmp_path / "published", ignore=shutil.ignore_patterns(".fourge"))
    result = fourge.evaluate(
        published,
        tasks=["arc_challenge"],
        limit=2,
        engine="hf",
        task_data=[bench.data],
        output=tmp_path / "results",
        **SETTINGS,
    )
    assert result.evaluations[0]["notes"] == []  # there is no baseline to be another model
    reason = f"{published} kept no calibration tokens in .fourge"
    assert result.evaluations[0]["contamination"]["not_checked"] == reason
    assert f"contamination: not checked ({reason})" in " ".join(evaluate_summary(result).split())


def test_a_full_disk_at_the_end_is_named(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "results" / "samples"))

    monkeypatch.setattr("fourge.evaluation.folder.replaced", full)
    with pytest.raises(InputError, match="results/samples: No space left on device; make room, then the same command"):
        fourge.evaluate(
            baseline=str(bench.model),
            tasks=["arc_challenge"],
            limit=2,
            engine="hf",
            task_data=[bench.data],
            output=tmp_path / "results",
            **SETTINGS,
        )


def test_no_shots_need_no_data_to_draw_them_from(bench: Bench, tmp_path: Path) -> None:
    import shutil

    few = tmp_path / "data" / "Rowan" / "hellaswag"
    few.mkdir(parents=True)
    shutil.copy(bench.data / "Rowan" / "hellaswag" / "validation.jsonl", few)
    options = SETTINGS | {"baseline": str(bench.model), "tasks": ["hellaswag"], "task_data": [tmp_path / "data"]}
    fourge.evaluate(output=tmp_path / "results", **options)
    assert len(logged(tmp_path / "results" / "baseline", "hellaswag")) == 8
    with pytest.raises(InputError, match="task hellaswag also reads train"):
        fourge.evaluate(output=tmp_path / "results", num_fewshot=1, **options)


@pytest.mark.slow
def test_torchrun_gives_the_same_evaluation(bench: Bench, tmp_path: Path) -> None:
    """Log-likelihoods and generated answers by two ranks: one voice, and all that one process found."""
    arguments = ["-m", "fourge", "evaluate", str(bench.quantized), "--baseline", str(bench.model), "--engine=walk"]
    arguments += ["--tasks=arc_challenge,gsm8k", "--num-fewshot=2", "--limit=4", f"--gen-kwargs={SHORT}"]
    arguments += [f"--task-data={bench.data}", "--device=cpu", "--threads=1", "--micro-batch-tokens=128", "--json"]
    found = []
    for name, launcher in (("alone", []), ("together", ["-m", "torch.distributed.run", "--nproc-per-node=2"])):
        command = [sys.executable, *launcher, *arguments, "--output", tmp_path / name]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert done.stderr.count("Shared beginnings:") == 1
        assert done.stderr.count("| layer 1 ") == done.stderr.count("layer 1 ")
        found.append(json.loads(done.stdout)["evaluations"][0])
    for evaluation in found:
        for differs in ("command", "created", "cost"):
            del evaluation[differs]
    assert found[0] == found[1]
    hidden = list((tmp_path / "together").rglob("hidden*"))
    assert not hidden


def test_list_data(bench: Bench, tmp_path: Path) -> None:
    from fourge.report.evaluate_text import evaluate_summary

    listed = fourge.evaluate(suite="openllm-v1", list_data=True, task_data=[bench.data])
    assert [task.items for task in listed.listed] == [1172, 1319, 10042, 14042, 817, 1267]
    assert evaluate_summary(listed).endswith("All data is there.")
    nothing = fourge.evaluate(suite="hermes4", list_data=True, task_data=[tmp_path])
    text = evaluate_summary(nothing)
    assert "MISSING cais/mmlu/abstract_algebra:test and 113 more" in text
    assert "openbookqa: allenai/openbookqa, 500 questions from test" in text
    unasked = evaluate_summary(fourge.evaluate(suite="smoke", list_data=True))
    assert "MISSING" not in unasked and "--fetch-data DIR makes such a folder" in unasked


QUIZ = """\
task: my_quiz
dataset_path: allenai/ai2_arc
dataset_name: ARC-Challenge
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list:
  - metric: acc
"""


def test_options_mean_what_they_mean_to_lm_eval(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own run asks the same of the same items: a task file of the user's, seed, system instruction, share."""
    import functools

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_quiz.yaml").write_text(QUIZ)
    # Without lm-eval's own task files, which take a quarter of a minute to read.
    no_defaults = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", no_defaults)
    options: dict[str, Any] = {"num_fewshot": 2, "limit": 0.3, "system_instruction": "ba be"}
    result = fourge.evaluate(
        baseline=str(bench.model),
        tasks=["my_quiz"],
        include_path=tmp_path / "tasks",
        seed=7,
        task_data=[bench.data],
        output=tmp_path / "results",
        **options,
        **SETTINGS,
    )
    settings = result.evaluations[0]["settings"]
    assert (settings["limit"], settings["seed"], settings["system_instruction"]) == (0.3, 7, "ba be")
    monkeypatch.chdir(bench.clones)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(bench.model), dtype="float32", device="cpu", batch_size=8),
        tasks=["my_quiz"],
        task_manager=no_defaults(include_path=str(tmp_path / "tasks")),
        bootstrap_iters=0,
        **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 7),
        **options,
    )
    ours = logged(tmp_path / "results" / "baseline", "my_quiz")
    assert 0 < len(ours) < len(rows_of("arc_challenge", "test"))
    assert_same_answers(ours, theirs["samples"]["my_quiz"], tolerance=1e-5)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such task": (
        {"tasks": ["arc_challange"]},
        r"--tasks arc_challange: lm-eval has no such task; did you mean arc",
    ),
    "no tasks": ({}, "name the tasks: --suite"),
    "not of the suite": ({"tasks": ["sciq,gsm8k"], "suite": "smoke"}, "--tasks gsm8k: suite smoke has no such task"),
    "no such suite": ({"suite": "tiny"}, "--suite tiny: not known"),
    "shots of a suite": ({"suite": "smoke", "num_fewshot": 3}, "--num-fewshot: suite smoke has its own"),
    "no items": ({"suite": "smoke", "limit": 0}, "--limit 0: give a whole number of items, or a share"),
    "parts of items": ({"suite": "smoke", "limit": 2.5}, "--limit 2.5: give a whole number"),
    "task files for a suite": ({"suite": "smoke", "include_path": Path()}, "--include-path: suite smoke is of"),
    "no task files": (
        {"tasks": ["my_quiz"], "include_path": Path("nowhere")},
        "--include-path nowhere: no such folder",
    ),
    "turns without a template": (
        {"tasks": ["arc_challenge"], "fewshot_as_multiturn": True},
        "--fewshot-as-multiturn: turns need a chat template",
    ),
    "thinking without a template": (
        {"tasks": ["arc_challenge"], "thinking": "on"},
        "--thinking on: goes through the chat template",
    ),
    "no switch for thinking": (
        {"tasks": ["arc_challenge"], "thinking": "on", "apply_chat_template": True},
        r"--thinking on: the chat template in .* has no switch for it",
    ),
    "sampling in the walk": (
        {"tasks": ["gsm8k"], "gen_kwargs": "temperature=0.6,do_sample=true", "engine": "walk"},
        "--tasks gsm8k: samples its answers .* the walk generates greedily alone",
    ),
    "twice the same": ({"tasks": ["mmlu_anatomy", "mmlu_stem"]}, "mmlu_anatomy and mmlu_stem both hold mmlu_anatomy"),
    "a url without its engine": (
        {"tasks": ["arc_challenge"], "engine": "hf", "baseline_url": "http://127.0.0.1:1"},
        "--baseline-url is for --engine vllm",
    ),
    "an engine without its url": ({"tasks": ["arc_challenge"], "engine": "vllm"}, "name it with --baseline-url"),
    "nobody at the url": (
        {"tasks": ["arc_challenge"], "baseline_url": "http://127.0.0.1:1"},
        "--baseline-url http://127.0.0.1:1: no OpenAI server answers there",
    ),
    "no url at all": (
        {"tasks": ["arc_challenge"], "baseline_url": "localhost"},
        "--baseline-url localhost: not a URL; write http://HOST:PORT",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = BAD[case]
    given = SETTINGS | {"baseline": str(bench.model), "output": tmp_path / "out", "task_data": [bench.data]} | options
    with pytest.raises(InputError, match=message) as caught:
        fourge.evaluate(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_models(bench: Bench, tmp_path: Path) -> None:
    options = SETTINGS | {"tasks": ["arc_challenge"], "task_data": [bench.data]}
    with pytest.raises(InputError, match="name a quantized directory, or a --baseline"):
        fourge.evaluate(**options)
    with pytest.raises(InputError, match="where are the results to go"):
        fourge.evaluate(baseline=str(bench.model), **options)
    with pytest.raises(InputError, match="nothing here is quantized"):
        fourge.evaluate(bench.model, **options)
    (tmp_path / ".fourge").mkdir()
    with pytest.raises(InputError, match="not finished; the `fourge quantize` command that began it"):
        fourge.evaluate(tmp_path, **options)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_baseline_that_is_another_model_is_refused(file: str, bench: Bench, tmp_path: Path) -> None:
    """Of the same shape: a bit of the weights, a space in a document."""
    import shutil

    other = shutil.copytree(bench.model, tmp_path / "other")
    content = bytearray((other / file).read_bytes())
    content[-2:] = bytes([content[-2] ^ 1, content[-1]]) if file.endswith(".safetensors") else content[-2:] + b" "
    (other / file).write_bytes(content)
    options = SETTINGS | {"tasks": ["arc_challenge"], "task_data": [bench.data], "output": tmp_path / "results"}
    with pytest.raises(InputError, match=rf"--baseline {other}: its {file} is not the one that {bench.quantized} was"):
        fourge.evaluate(bench.quantized, baseline=str(other), **options)
    assert not (tmp_path / "results").exists()


def test_where_the_source_is_not_recorded_that_is_said(bench: Bench, tmp_path: Path) -> None:
    import shutil

    from fourge.evaluation.same_source import require_same_source

    assert require_same_source(bench.quantized, bench.model) is None
    unsigned = shutil.copytree(bench.quantized, tmp_path / "out", ignore=shutil.ignore_patterns("fourge.json"))
    said = f"whether {unsigned} was made from {bench.model} was not checked: it has no fourge.json"
    assert require_same_source(unsigned, bench.model) == said
    renamed = shutil.copytree(bench.model, tmp_path / "renamed")
    weights = json.dumps({"weight_map": dict.fromkeys(_tensor_names(bench.model), "all.safetensors")})
    (renamed / "model.safetensors").rename(renamed / "all.safetensors")
    (renamed / "model.safetensors.index.json").write_text(weights)
    assert "the weights lie in other files" in str(require_same_source(bench.quantized, renamed))
    result = fourge.evaluate(
        unsigned,
        baseline=str(bench.model),
        tasks=["arc_challenge"],
        limit=2,
        engine="hf",
        task_data=[bench.data],
        output=tmp_path / "results",
        **SETTINGS,
    )
    assert said in result.evaluations[0]["notes"]


def _tensor_names(directory: Path) -> list[str]:
    from fourge.checkpoint.reader import Checkpoint

    return list(Checkpoint.open(directory).tensors)


def test_no_hub_and_no_local_data(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"--tasks arc_challenge: its data is not in the cache.*with --task-data"):
        fourge.evaluate(baseline=str(bench.model), tasks=["arc_challenge"], output=tmp_path / "out", **SETTINGS)


def test_code_that_a_model_wrote_is_not_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(InputError, match="--tasks arc_challenge: runs code that the model wrote"):
        fourge.evaluate(
            baseline=str(bench.model),
            tasks=["arc_challenge"],
            task_data=[bench.data],
            output=tmp_path,
            **SETTINGS,
        )


def test_lm_eval_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"needs lm-eval, which is not installed .*pip install 'fourge\[eval\]'"):
        fourge.evaluate(suite="smoke", list_data=True)
