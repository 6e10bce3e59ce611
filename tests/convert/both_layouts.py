"""Checkpoints in both layouts as tests look at them and change them: with json and safetensors, not with ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
NAMES = {
    "weight_packed": "weight",
    "weight_scale": "weight_scale",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}
LEADS_BACK, LEADS_NOWHERE = np.float32(0.0012345), np.float32(0.00188)
"""Of the first, the reciprocal's reciprocal in FP32 is itself; of the second, another number."""


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for shard in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }


def contents(directory: Path) -> dict[str, bytes]:
    """Every file that makes the checkpoint, by name; a job's `.fourge` is not one."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object], **wording: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, **wording))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Applies `change` to the tensors of every shard of a checkpoint; it must not move tensors between them."""
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})


def set_scales(directory: Path, suffix: str, value: float) -> None:
    """Puts `value` in the place of every tensor of our layout whose name ends with `suffix`."""
    edit_tensors(directory, lambda t: t.update({n: torch.tensor([value]) for n in t if n.endswith(suffix)}))
