"""A small model directory as other tools write it, with safetensors itself as the writer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "model.embed_tokens.weight": torch.randn(50, 8, generator=generator).to(torch.bfloat16),
        "model.layers.0.mlp.weight": torch.randn(6, 8, generator=generator).to(torch.float16),
        "model.layers.0.scalar": torch.tensor(2.5),
        "model.layers.0.empty": torch.zeros(0, 3),
        "model.norm.weight": torch.randn(8, generator=generator),
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return make_tensors()


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """One `model.safetensors` with its config."""
    directory = tmp_path / "single"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two shards with their index: the embedding in the first, the rest in the second."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    weight_map = {name: SHARDS["embed" not in name] for name in tensors}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, directory / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture
def edit_index(sharded: Path) -> Callable[[Callable[[dict], object]], None]:
    """Applies a function to the index of `sharded` in place."""

    def edit(change: Callable[[dict], object]) -> None:
        path = sharded / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit
