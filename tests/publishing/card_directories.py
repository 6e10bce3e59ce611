"""A directory as the published Hermes-4-405B in NVFP4 would have it, written by hand: everything but the weights."""

import json
from pathlib import Path
from typing import Any

from fourge.checkpoint.compressed_tensors import quantization_config

LLAMA_405B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 126,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Llama 3.1 405B as published (The Llama 3 Herd of Models, table 3); Hermes-4-405B has the same shape."""

SCORES = {
    "arc_challenge": ("acc_norm", "none", 25, 1172, 0.7517),
    "gsm8k": ("exact_match", "strict-match", 5, 1319, 0.9249),
    "hellaswag": ("acc_norm", "none", 10, 10042, 0.8849),
    "mmlu": ("acc", "none", None, 14042, 0.8319),
    "truthfulqa_mc2": ("acc", "none", 0, 817, 0.6513),
    "winogrande": ("acc", "none", 5, 1267, 0.8122),
}
"""What the published card reports: metric, filter, shots (a group has none of its own), items, score."""
SOURCE_CARD = """\
---
license: llama3
license_link: https://example.org/licence
language:
- en
tags:
- chat
- reasoning
---

# Hermes 4

The card of the base model.
"""


def write_405b(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write(folder / "config.json", LLAMA_405B | {"quantization_config": quantization_config("NVFP4", ["lm_head"], None)})
    write(folder / "fourge.json", provenance())
    write(folder / ".fourge/evaluate/openllm-v1/evaluation.json", evaluation())
    (folder / "README.md").write_text(SOURCE_CARD)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("a licence\n")
    return folder


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    """Puts `value` in the place that `keys` lead to."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def provenance() -> dict[str, Any]:
    """`fourge.json` of the published recipe."""

    def tokens(sequences: int, digest: str) -> dict[str, Any]:
        origin = {"kind": "hub", "split": "train_sft", "revision": "8049631c"}
        return {"sequences": sequences, "tokens": sequences * 2048, "sha256": digest * 64, "origin": origin}

    name = "HuggingFaceH4/ultrachat_200k"
    return {
        "format": 1,
        "settings": {
            "model": "NousResearch/Hermes-4-405B",
            "revision": None,
            "scheme": "NVFP4",
            "kv_cache_scheme": None,
            "method": "max",
            "smooth": False,
            "targets": ["Linear"],
            "ignore": ["lm_head"],
            "calibration": name,
            "probe": None,
            "num_calibration_samples": 512,
            "num_validation_samples": 0,
            "num_probe_samples": 32,
            "max_seq_length": 2048,
            "seed": 42,
            "input_headroom": 1.0,
            "micro_batch_tokens": 2048,
            "compute_dtype": "float32",
            "device": "cpu",
            "threads": 16,
        },
        "source": {
            "name": "NousResearch/Hermes-4-405B",
            "repository": "NousResearch/Hermes-4-405B",
            "revision": "0123abcd",
            "files": {"model-00001-of-00001.safetensors": {"size": 811_700_000_000, "sha256": "c" * 64}},
        },
        "output": {"files": {}},
        "versions": {"fourge": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "data": {
            "source": name,
            "probe_source": None,
            "seed": 42,
            "max_seq_length": 2048,
            "calibration": tokens(512, "a"),
            "probe": tokens(32, "b"),
        },
        "events": [{"step": "layer 3", "event": "input channels never active", "channels": 2}],
        "dropped_tensors": [],
        "fidelity": {
            "kl_div": estimate(0.0432),
            "top1_agreement": estimate(0.9512),
            "perplexity_bf16": estimate(3.5),
            "perplexity_nvfp4": estimate(3.625),
        },
    }


def estimate(mean: float) -> dict[str, Any]:
    return {"mean": mean, "standard_error": 0.001, "tokens": 65504}


def evaluation() -> dict[str, Any]:
    """`evaluation.json` with the published scores, and a base model half a point better at everything."""
    tasks = []
    for task, (metric, name, shots, items, score) in SCORES.items():
        tasks.append(
            {
                "task": task,
                "metric": metric,
                "filter": name,
                "num_fewshot": shots,
                "version": 1.0,
                "items": items,
                "chance": None,
                "at_chance": False,
                "baseline": {"score": score + 0.005, "se": 0.01},
                "quantized": {"score": score, "se": 0.01},
                "delta": {"value": -0.005, "se": 0.0021},
                "recovery": {"value": score / (score + 0.005), "se": 0.0026},
                "only_baseline": 17,
                "only_quantized": 11,
                "mcnemar_p": 0.3,
                "holm_p": 1.0,
                "generation": None,
                "note": None,
            }
        )
    return {
        "kind": "fourge-evaluation",
        "version": 1,
        "suite": "openllm-v1",
        "command": "fourge evaluate OUT --baseline NousResearch/Hermes-4-405B --suite openllm-v1",
        "created": "2026-11-24T00:00:00+00:00",
        "engine": {
            "name": "walk",
            "numerics": "W4A4 emulated",
            "compute_dtype": "float32",
            "device": "cpu",
            "versions": {"fourge": "0.1.0", "lm_eval": "0.4.13"},
        },
        "models": {
            "baseline": {"name": "NousResearch/Hermes-4-405B", "path": "base"},
            "quantized": {"name": "OUT", "path": "out"},
        },
        "settings": {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "limit": None,
            "limits": {},
            "thinking": None,
            "add_bos_token": None,
            "seed": 1234,
        },
        "tasks": tasks,
        "macro": None,
        "item_weighted": None,
        "per_token": None,
        "sharing": None,
        "contamination": None,
        "cost": {"seconds": 86400.0, "peak_resident_bytes": 20_000_000_000, "bytes_read": 811_000_000_000},
    }
