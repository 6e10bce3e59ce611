"""llm-compressor's `oneshot` on the tokens of one of our jobs. Runs in llm-compressor's own environment.

    python llmcompressor_oneshot.py MODEL OUTPUT TOKENS.safetensors [--scheme NVFP4] [--recipe awq-gptq]

Prints one JSON line: seconds of calibrating and of saving, peak resident bytes, versions.
"""

import time
from typing import Any

import compressed_tensors
import llmcompressor
import torch
from common import parse_arguments, read_calibration, report
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = ("rtn", "expanded-mse", "gptq", "gptq-expanded-mse", "awq-gptq", "awq-gptq-expanded-mse", "kv-fp8", "mixture")
MIXTURE = {"FP8_DYNAMIC": ["re:.*down_proj"], "NVFP4": ["re:.*(q|k|v|o|gate|up)_proj"]}
KV_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
# The largest of all samples, as for NVFP4's inputs; left out, it is a moving average that the first ones dominate.
KV_FP8 |= {"observer": "static_minmax"}


def modifiers(recipe: str, scheme: str) -> list[Any]:
    """A recipe's modifiers, with the library's defaults but for what its name says."""
    common: dict[str, Any] = {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"]}
    if recipe.endswith("expanded-mse"):
        common["weight_observer"] = "nvfp4_expanded_mse"
    if recipe == "mixture":
        del common["targets"]
        common["scheme"] = MIXTURE
    if recipe == "kv-fp8":
        common["kv_cache_scheme"] = KV_FP8
    quantizer = GPTQModifier(**common) if "gptq" in recipe else QuantizationModifier(**common)
    return [AWQModifier(), quantizer] if recipe.startswith("awq") else [quantizer]


def main() -> None:
    options = parse_arguments(__doc__, RECIPES)
    if options.threads:
        torch.set_num_threads(options.threads)
    if not torch.cuda.is_available():
        # AWQ pins its memory for transfers to a GPU, and stops where there is none. No number depends on it.
        IntermediatesCache.pin_memory = lambda *_: None
    sequences = read_calibration(options.tokens)
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(s) for s in sequences]})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=modifiers(options.recipe, options.scheme),
        max_seq_length=max(map(len, sequences)),
        num_calibration_samples=len(sequences),
        shuffle_calibration_samples=False,
    )
    calibrated = time.monotonic()
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)
    report(
        calibrated - began,
        time.monotonic() - calibrated,
        llmcompressor=llmcompressor.__version__,
        compressed_tensors=compressed_tensors.__version__,
    )


if __name__ == "__main__":
    main()
