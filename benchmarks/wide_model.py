"""A checkpoint of any width and few layers whose weights are hard to quantize, written as fast as the disk takes it."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROWS = 1024
POOL = 1 << 26


class Values:
    """BF16 weights with what makes real ones hard: rows of different size, and outlier channels.

    On a CPU normal values come from one pool, read from another place every time: a layer of a 405B model has 3.2
    billion of them. A GPU draws them as they are needed.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._pool = None if device == "cuda" else self._normal(POOL).bfloat16()

    def blocks(self, rows: int, columns: int) -> Iterator[torch.Tensor]:
        """A weight `[rows, columns]`, some rows at a time, on the CPU."""
        spread = (self._normal(columns) * 0.3).exp()
        loud = torch.rand(columns, generator=self._generator, device=self._device) < 0.002
        spread[loud] *= 20
        by_column = (spread / columns**0.5).bfloat16()
        for start in range(0, rows, ROWS):
            count = min(ROWS, rows - start)
            by_row = (self._normal(count, 1) * 0.3).exp().bfloat16()
            yield self._to_host(self._some(count, columns).mul(by_column).mul_(by_row))

    def _to_host(self, block: torch.Tensor) -> torch.Tensor:
        return torch.empty(block.shape, dtype=block.dtype, pin_memory=True).copy_(block) if block.is_cuda else block

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)

    def _some(self, count: int, columns: int) -> torch.Tensor:
        if self._pool is None:
            return self._normal(count, columns).bfloat16()
        first = int(torch.randint(POOL - count * columns, (1,), generator=self._generator))
        return self._pool[first : first + count * columns].view(count, columns)


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], values: Values) -> None:
    """A safetensors file of BF16 tensors, never whole in memory; norms, of one dimension, are ones."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for shape in shapes.values():
            blocks = [torch.ones(shape, dtype=torch.bfloat16)] if len(shape) == 1 else values.blocks(*shape)
            for block in blocks:
                file.write(block.view(torch.uint8).numpy().data)


def write_wide(directory: Path, config: dict[str, Any], device: str) -> None:
    """A Llama with `config`, a file for each layer, one for the embedding and one for the head."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    files = {"embedding.safetensors": {"model.embed_tokens.weight": (vocab, hidden)}}
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        prefix = f"model.layers.{layer}."
        files[layer_file(layer)] = {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
    files["head.safetensors"] = {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    values = Values(device)
    for name, shapes in files.items():
        write_file(directory / name, shapes, values)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"
