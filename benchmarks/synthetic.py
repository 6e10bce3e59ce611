"""Checkpoints of any width and depth with random weights, written a layer at a time."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def llama_config(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """`config.json` of a Llama of that shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def write_llama(directory: Path, config: dict[str, Any]) -> int:
    """Writes a random Llama; returns the bytes of one decoder layer."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        return sum(tensor.nbytes for tensor in tensors.values())

    save("embedding.safetensors", {"model.embed_tokens.weight": weight(config["vocab_size"], hidden)})
    layer_bytes = 0
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        layer_bytes = save(
            f"layer-{layer:03d}.safetensors",
            {
                prefix + "self_attn.q_proj.weight": weight(hidden, hidden),
                prefix + "self_attn.k_proj.weight": weight(kv, hidden),
                prefix + "self_attn.v_proj.weight": weight(kv, hidden),
                prefix + "self_attn.o_proj.weight": weight(hidden, hidden),
                prefix + "mlp.gate_proj.weight": weight(intermediate, hidden),
                prefix + "mlp.up_proj.weight": weight(intermediate, hidden),
                prefix + "mlp.down_proj.weight": weight(hidden, intermediate),
                prefix + "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                prefix + "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            },
        )
    save(
        "head.safetensors",
        {
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            "lm_head.weight": weight(config["vocab_size"], hidden),
        },
    )
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    return layer_bytes


def add_tokenizer(directory: Path, vocab: int) -> None:
    """Gives a random Llama the tests' tokenizer, of `vocab` words."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from conftest import save_tokenizer

    save_tokenizer(directory, vocab)
