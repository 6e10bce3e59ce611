"""Model-Optimizer's quantization and export on the tokens of one of our jobs. Runs in Model-Optimizer's environment.

    python modelopt_export.py MODEL OUTPUT TOKENS.safetensors [--scheme NVFP4]

Prints one JSON line: seconds of calibrating and of saving, peak resident bytes, version.
"""

import argparse
import json
import resource
import time

import modelopt
import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIGS = {"NVFP4": mtq.NVFP4_DEFAULT_CFG, "NVFP4A16": mtq.W4A16_NVFP4_CFG}


def read_calibration(path: str) -> list[torch.Tensor]:
    """The calibration sequences of a job's `tokens.safetensors`."""
    stored = load_file(path)
    ends = np.cumsum(stored["calibration.lengths"])
    return [torch.from_numpy(part).long() for part in np.split(stored["calibration.tokens"], ends[:-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("tokens")
    parser.add_argument("--scheme", default="NVFP4", choices=CONFIGS)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sequences = read_calibration(options.tokens)

    def calibrate(model: torch.nn.Module) -> None:
        for sequence in sequences:
            model(sequence.unsqueeze(0))

    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model = mtq.quantize(model, CONFIGS[options.scheme], calibrate)
    calibrated = time.monotonic()
    export_hf_checkpoint(model, export_dir=options.output)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
    saved = time.monotonic()
    print(
        json.dumps(
            {
                "calibrating_seconds": calibrated - began,
                "saving_seconds": saved - calibrated,
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "modelopt": modelopt.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
