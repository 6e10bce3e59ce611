"""Configs written by hand, and plans of them that measure nothing."""

import json
from pathlib import Path
from typing import Any

import fourge
from fourge import PlanReport

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


def write_config(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """The 405B's config with `changes`, written to `folder`; None takes a key out."""
    path = folder / name
    path.write_text(json.dumps({key: value for key, value in (LLAMA_405B | changes).items() if value is not None}))
    return path


def plan(model: Path, **options: Any) -> PlanReport:
    """`fourge.plan` without its measurements."""
    return fourge.plan(str(model), no_probe=True, device="cpu", threads=1, **options)


def describe(model: Path, **options: Any) -> Any:
    """The facts that a plan of `model` starts from."""
    from fourge.planning import model as planning_model
    from fourge.walk.choices import Selection

    return planning_model.describe(str(model), None, Selection(**options))[0]
