"""What vLLM is compared with: transformers on our quantized weights, in FP32 arithmetic."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourge.nvfp4.quantize import QuantizedWeight, dequantize_weight


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, as its files have it."""
    return {name: tensor for shard in checkpoint.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def exact_weights(checkpoint: Path) -> dict[str, Tensor]:
    """FP32 weights `[N, K]` of every quantized Linear, by its name."""
    stored = stored_tensors(checkpoint)
    linears = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    parts = ("weight_packed", "weight_scale", "weight_global_scale")
    return {
        linear: dequantize_weight(QuantizedWeight(*(stored[f"{linear}.{part}"] for part in parts)))
        for linear in linears
    }


def w4a4_lane(checkpoint: Path) -> Any:
    """The checkpoint in transformers, where compressed-tensors quantizes the inputs of every Linear.

    Its own weights are rounded to BF16; they are required to be ours in BF16, and replaced by ours in FP32.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.hf_quantizer.compressor.decompress_model(model)
    for linear, weight in exact_weights(checkpoint).items():
        module = model.get_submodule(linear)
        assert torch.equal(module.weight.bfloat16(), weight.bfloat16()), linear
        module.weight.data = weight
    return model


def w4a16_lane(source: Path, checkpoint: Path) -> Any:
    """The source in transformers with everything of the checkpoint in place of its own; inputs stay as they are.

    Everything: smoothing changes norms and biases too.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    names = model.state_dict().keys()
    kept = {name: tensor for name, tensor in stored_tensors(checkpoint).items() if name in names}
    model.load_state_dict(kept, strict=False)
    for linear, weight in exact_weights(checkpoint).items():
        model.get_submodule(linear).weight.data = weight
    return model


def prompt_logprobs(model: Any, prompts: list[list[int]]) -> Tensor:
    """Log-probability of every prompt token but the first, all prompts in a row, FP32 `[tokens]`."""
    parts = []
    for ids in prompts:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
        parts.append(logprobs.gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(parts)


def double_global_scale(checkpoint: Path, linear: str) -> None:
    """Doubles the weight's divisor of one Linear, in place: its weights are half of what they should be."""
    name = f"{linear}.weight_global_scale"
    (shard,) = (shard for shard in checkpoint.glob("*.safetensors") if name in load_file(shard))
    tensors = load_file(shard)
    save_file(tensors | {name: tensors[name] * 2}, shard, metadata={"format": "pt"})
