"""lm-eval's own `hf` model on pico models in FP32 on the CPU, one request at a time; and texts to ask it about."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourge.checkpoint.reader import Checkpoint
from fourge.nvfp4.quantize import QuantizedWeight, dequantize_weight

WORDS = [left + right for left in "bdfgkl" for right in ("a", "e", "i", "o", "u")]


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def load_source(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def load_quantized(directory: Path) -> Any:
    """transformers and compressed-tensors on our checkpoint, in FP32 arithmetic.

    compressed-tensors rounds decompressed weights to BF16, which a tensor core that multiplies the codes does not;
    they are required to be ours in BF16, and then replaced by ours in FP32.
    """
    model = load_source(directory)
    model.hf_quantizer.compressor.decompress_model(model)
    checkpoint = Checkpoint.open(directory)
    for name in checkpoint.tensors:
        if name.endswith(".weight_packed"):
            linear = name.removesuffix(".weight_packed")
            parts = (checkpoint.read(f"{linear}.{part}") for part in ("weight_packed", "weight_scale"))
            weight = QuantizedWeight(*parts, checkpoint.read(f"{linear}.weight_global_scale"))
            exact = dequantize_weight(weight)
            module = model.get_submodule(linear)
            assert torch.equal(module.weight, exact.bfloat16()), linear
            module.weight.data = exact
    return model


def word_tokenizer(directory: Path) -> Any:
    """The pico models' tokenizer as its file has it; AutoTokenizer would build Qwen's own for a Qwen model."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def hf_model(model: Any, directory: Path, **options: Any) -> Any:
    """lm-eval's HFLM around a loaded model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=word_tokenizer(directory), batch_size=1, **options)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]
