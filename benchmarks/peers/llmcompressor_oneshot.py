"""llm-compressor's `oneshot` on the tokens of one of our jobs. Runs in llm-compressor's own environment.

    python llmcompressor_oneshot.py MODEL OUTPUT TOKENS.safetensors [--scheme NVFP4]

Prints one JSON line: seconds of calibrating and of saving, peak resident bytes, versions.
"""

import argparse
import json
import resource
import time

import compressed_tensors
import llmcompressor
import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_calibration(path: str) -> list[list[int]]:
    """The calibration sequences of a job's `tokens.safetensors`."""
    stored = load_file(path)
    ends = np.cumsum(stored["calibration.lengths"])
    return [part.tolist() for part in np.split(stored["calibration.tokens"], ends[:-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("tokens")
    parser.add_argument("--scheme", default="NVFP4")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sequences = read_calibration(options.tokens)
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(s) for s in sequences]})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=QuantizationModifier(targets="Linear", scheme=options.scheme, ignore=["lm_head"]),
        max_seq_length=max(map(len, sequences)),
        num_calibration_samples=len(sequences),
        shuffle_calibration_samples=False,
    )
    calibrated = time.monotonic()
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)
    saved = time.monotonic()
    print(
        json.dumps(
            {
                "calibrating_seconds": calibrated - began,
                "saving_seconds": saved - calibrated,
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "llmcompressor": llmcompressor.__version__,
                "compressed_tensors": compressed_tensors.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
