"""llm-compressor's `model_free_ptq`: weights alone, file by file, no model built. Runs in its own environment.

    python llmcompressor_model_free.py MODEL OUTPUT [--scheme NVFP4A16] [--workers 1] [--threads 2]

Prints one JSON line: seconds, peak resident bytes, version.
"""

import argparse
import time

import llmcompressor
import torch
from common import report
from llmcompressor import model_free_ptq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--scheme", default="NVFP4A16")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    model_free_ptq(
        model_stub=options.model,
        save_directory=options.output,
        scheme=options.scheme,
        # It would quantize the embedding too, although its targets say Linear.
        ignore=["lm_head", "re:.*embed_tokens", "re:.*norm"],
        max_workers=options.workers,
        device="cpu",
    )
    report(time.monotonic() - began, 0.0, llmcompressor=llmcompressor.__version__)


if __name__ == "__main__":
    main()
