"""lm-eval from end to end on local tasks: its scores of the walk are those of its own `hf` model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from oracles import hf_model, load_quantized, load_source, words

import fourge
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.requests import RunLmEval

TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "num_fewshot": 3,
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_letters": {
        "output_type": "multiple_choice",
        "num_fewshot": 2,
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["ba", "be", "bi", "bo"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
RIGHT_OR_WRONG = ("acc", "acc_norm")


def write_tasks(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """Task files over one jsonl of 24 questions each for asking and for shots, in words that pico models know."""
    rng = np.random.default_rng(4)
    files = {}
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        docs = [
            {
                "question": words(rng, 5),
                "choices": [words(rng, int(rng.integers(1, 4))) for _ in range(4)],
                "label": int(rng.integers(4)),
                "text": words(rng, int(rng.integers(5, 90))),
            }
            for _ in range(24)
        ]
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        files[split] = str(path)
    for name, task in tasks.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
        splits = {"test_split": "test", "fewshot_split": "train"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **splits, **task}))
    return folder


def run_on(folder: Path, **options: Any) -> RunLmEval:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = sorted(path.stem for path in folder.glob("*.yaml"))

    def run(lm: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        results: dict[str, Any] = simple_evaluate(
            lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
        )
        return results

    return run


def require_same_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Right or wrong: identical, item by item. Likelihoods: equal to FP32 rounding."""
    assert ours["results"].keys() == theirs["results"].keys()
    for task, scores in theirs["results"].items():
        for key, value in scores.items():
            if isinstance(value, float):
                exact = key.partition(",")[0] in RIGHT_OR_WRONG
                assert ours["results"][task][key] == (value if exact else pytest.approx(value, rel=1e-6)), (task, key)
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"] and mine["arguments"] == other["arguments"]
            for metric in RIGHT_OR_WRONG:
                assert mine.get(metric) == other.get(metric)


@pytest.mark.parametrize("chat", [False, True])
def test_every_score_of_both_models_is_that_of_lm_evals_hf_model(
    chat: bool, pico: Callable[..., Path], tmp_path: Path
) -> None:
    model, output = pico(), tmp_path / "out"
    sets: dict[str, Any] = {"num_calibration_samples": 4, "num_probe_samples": 1, "max_seq_length": 24}
    fourge.quantize(str(model), output, method="max", calibration="random", threads=1, **sets)
    (tmp_path / "tasks").mkdir()
    folder = write_tasks(tmp_path / "tasks", TASKS)
    run = run_on(folder, apply_chat_template=chat, fewshot_as_multiturn=chat)
    options: dict[str, Any] = {"max_length": 64}
    engine = WalkEngine(WalkSettings(model, output, tmp_path / "walk", "float32", "cpu", **options))
    ours = engine.evaluate(run)
    require_same_scores(ours["baseline"], run(hf_model(load_source(model), model, **options)))
    require_same_scores(ours["quantized"], run(hf_model(load_quantized(output), output, **options)))
    assert engine.outcome is not None
    assert engine.outcome.tokens_walked < engine.outcome.tokens_requested / 2
    again = WalkEngine(WalkSettings(model, output, tmp_path / "walk", "float32", "cpu", **options))
    assert again.evaluate(run)["quantized"]["results"] == ours["quantized"]["results"]
    assert again.outcome is not None and again.outcome.bytes_read == 0 and again.outcome.continued
