"""Runs to compare: lm-eval's own output on pico models and made-up tasks, and folders written by hand."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = [left + right for left in "bdfgkl" for right in ("a", "e", "i", "o", "u")]

_CHOICE = """
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{question}"
doc_to_target: answer
doc_to_choice: options
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: {version}}}
"""

_GENERATE = """
task: told
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{options[answer][:1]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6, do_sample: false, temperature: 0.0}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "^ ?(.)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter: [{{function: regex, regex_pattern: "([bdfgkl])"}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

_LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{options[answer]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""

_GROUP = """
group: {name}
task: [{members}]
aggregate_metric_list:
  - {{metric: acc, aggregation: mean, weight_by_size: {by_size}}}
metadata: {{version: 2}}
"""


def write_tasks(folder: Path, version: float = 1.0, question: str = "{{question}}") -> Path:
    """lm-eval's task files: `plain`, the groups `subjects` and `apart` of unlike subjects, `told`, `last_word`."""
    folder.mkdir()
    for name, count, choices in (("plain", 30, 4), ("first", 12, 3), ("second", 25, 3), ("third", 7, 2)):
        data = write_questions(folder / f"{name}.jsonl", name, count, choices)
        text = _CHOICE.format(data=data, version=version, question=question)
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
        (folder / f"other_{name}.yaml").write_text(f"task: other_{name}\n{text}")
    (folder / "subjects.yaml").write_text(_GROUP.format(name="subjects", members="first, second, third", by_size=True))
    others = "other_first, other_second"
    (folder / "apart.yaml").write_text(_GROUP.format(name="apart", members=others, by_size=False))
    (folder / "told.yaml").write_text(_GENERATE.format(data=folder / "plain.jsonl"))
    (folder / "last_word.yaml").write_text(_LAST_WORD.format(data=folder / "plain.jsonl"))
    return folder


def write_questions(path: Path, seed: str, count: int, choices: int) -> Path:
    drawn = random.Random(seed)
    rows = [
        {
            "question": " ".join(drawn.choices(WORDS, k=drawn.randint(4, 9))),
            "options": [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 3))) for _ in range(choices)],
            "answer": drawn.randrange(choices),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(
    output: Path, task_files: Path, tasks: Sequence[str], model: str, model_args: str = "", **options: Any
) -> dict[str, Any]:
    """What `lm_eval --output_path OUTPUT --log_samples` does; gives the results as they are in memory."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(output))
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(task_files), include_defaults=False),
        evaluation_tracker=tracker,
        log_samples=True,
        bootstrap_iters=10,
        batch_size=8,
        **options,
    )
    assert results is not None
    kept = json.loads(json.dumps({**results, "samples": None}, default=str)) | {
        "samples": {task: [dict(sample) for sample in samples] for task, samples in results["samples"].items()}
    }
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return kept


def choice_record(doc_id: int, right: int, *, prompt: str = "", choices: int = 4, **changes: Any) -> dict[str, Any]:
    """lm-eval's record of a multiple-choice item whose `acc` is `right`, as it stands in a file."""
    prompt = prompt or f"Question {doc_id}"
    arguments = {f"gen_args_{i}": {"arg_0": prompt, "arg_1": f" choice {i}"} for i in range(choices)}
    responses = [[[str(-1.0 - i), "False"]] for i in range(choices)]
    return {
        "doc_id": doc_id,
        "doc": {"question": prompt},
        "target": "0",
        "arguments": arguments,
        "resps": responses,
        "filtered_resps": [response[0] for response in responses],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": "d",
        "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest(),
        "target_hash": "t",
        "acc": float(right),
    } | changes


def generation_record(doc_id: int, right: int, answer: str, **changes: Any) -> dict[str, Any]:
    """lm-eval's record of a generated answer, as it stands in a file."""
    record = choice_record(doc_id, right, metrics=["exact_match"], exact_match=float(right))
    del record["acc"]
    settings = {"until": ["\n"], "max_gen_toks": 8}
    return record | {
        "arguments": {"gen_args_0": {"arg_0": f"Question {doc_id}", "arg_1": settings}},
        "resps": [[answer]],
        "filtered_resps": [answer.split()[-1]],
        "filter": "strict-match",
        **changes,
    }


def write_run(
    folder: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Any] | None = None
) -> Path:
    """A folder as one lane of an evaluation is written."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, records in tasks.items():
        (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if results is not None:
        (folder / "results.json").write_text(json.dumps({"results": {}, **results}))
    return folder


def right_and_wrong(
    pattern: str, record: Callable[..., dict[str, Any]] = choice_record, **same: Any
) -> list[dict[str, Any]]:
    """Items right (1) or wrong (0) in this order."""
    return [record(doc_id, int(right), **same) for doc_id, right in enumerate(pattern)]
