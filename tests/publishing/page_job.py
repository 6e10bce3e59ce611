"""A pico model's finished job with an evaluation beside it, written by hand in lm-eval's form, hostile texts too."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fourge

HOSTILE = (
    "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile = 2'>\u2028&lt;b&gt;@@script@@"
)
NEEDLE = "quokka"

Answer = tuple[list[float], float]
"""The choices' log-likelihoods, and lm-eval's accuracy."""

ITEMS: list[tuple[str, list[str], int, Answer, Answer]] = [
    (f"Question: {HOSTILE}\nAnswer:", [" yes", " no"], 0, ([-1.0, -2.0], 1.0), ([-2.0, -1.0], 0.0)),
    (f"Question: what is a {NEEDLE}?\nAnswer:", [" a beast", " a bird"], 0, ([-3.0, -2.0], 0.0), ([-1.0, -2.0], 1.0)),
    ("Question: who flips?\nAnswer:", [f" {HOSTILE}", " nobody"], 1, ([-2.0, -1.0], 1.0), ([-1.0, -2.0], 0.0)),
    ("Question: both right\nAnswer:", [" yes", " no"], 0, ([-1.0, -2.0], 1.0), ([-1.0, -2.0], 1.0)),
    ("Question: both wrong\nAnswer:", [" yes", " no"], 1, ([-1.0, -2.0], 0.0), ([-1.0, -2.0], 0.0)),
]  # fmt: skip
TASK = "animals<i>"


def quantize_pico(model: Path, output: Path, **options: Any) -> Path:
    """A W4A4 checkpoint with a probe."""
    settings = {
        "num_calibration_samples": 4,
        "num_probe_samples": 2,
        "max_seq_length": 32,
        "threads": 1,
        "device": "cpu",
    }
    fourge.quantize(str(model), output, calibration="random", **settings | options)
    return output


def add_evaluation(output: Path) -> None:
    """Samples of both models, and the evaluation.json that `fourge evaluate` would write of them."""
    folder = output / ".fourge" / "evaluate" / "animals"
    for lane, answers in (("baseline", 3), ("quantized", 4)):
        (folder / lane).mkdir(parents=True)
        lines = [json.dumps(_sample(number, item, item[answers])) for number, item in enumerate(ITEMS)]
        (folder / lane / f"samples_{TASK}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "evaluation.json").write_text(json.dumps(_evaluation()))


def _sample(number: int, item: tuple[Any, ...], answer: Answer) -> dict[str, Any]:
    prompt, choices, target = item[:3]
    likelihoods, accuracy = answer
    return {
        "doc_id": number,
        "doc": {},
        "target": str(target),
        "arguments": {f"gen_args_{i}": {"arg_0": prompt, "arg_1": choice} for i, choice in enumerate(choices)},
        "resps": [[[str(value), "False"]] for value in likelihoods],
        "filtered_resps": [[str(value), "False"] for value in likelihoods],
        "filter": "none",
        "metrics": ["acc"],
        "acc": accuracy,
        "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest(),
        "target_hash": hashlib.sha256(str(target).encode()).hexdigest(),
    }


def _evaluation() -> dict[str, Any]:
    task = {
        "task": TASK, "metric": "acc", "filter": "none", "num_fewshot": 0, "version": 1.0, "items": 5, "chance": 0.5,
        "at_chance": True, "baseline": {"score": 0.6, "se": 0.2449}, "quantized": {"score": 0.4, "se": 0.2449},
        "delta": {"value": -0.2, "se": 0.3742}, "recovery": {"value": 0.6667, "se": 0.55}, "only_baseline": 2,
        "only_quantized": 1, "mcnemar_p": 1.0, "holm_p": 1.0, "generation": None, "note": HOSTILE,
    }  # fmt: skip
    return {
        "kind": "fourge-evaluation", "version": 1, "suite": None, "command": f"fourge evaluate {HOSTILE}",
        "created": "2026-11-24T01:03:09+00:00",
        "engine": {"name": "walk", "numerics": "W4A4 emulated", "compute_dtype": "float32", "device": "cpu",
                   "versions": {}},
        "models": {"baseline": {"name": "a", "path": "a"}, "quantized": {"name": "b", "path": "b"}},
        "settings": {"apply_chat_template": False, "fewshot_as_multiturn": False, "limit": None, "thinking": None,
                     "add_bos_token": None, "seed": 1},
        "tasks": [task], "macro": None, "item_weighted": None, "per_token": None, "sharing": None,
        "contamination": None,
        "cost": {"seconds": 1.0, "peak_resident_bytes": 1, "bytes_read": 1},
    }  # fmt: skip
