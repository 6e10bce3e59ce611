"""What the peers' scripts have in common: our calibration sequences, and the JSON line that each ends with."""

import argparse
import json
import resource

import numpy as np
import torch
from safetensors.numpy import load_file


def parse_arguments(description: str | None, recipes: tuple[str, ...], **extra: int) -> argparse.Namespace:
    """MODEL OUTPUT TOKENS, `--recipe` (by default the first), `--threads`, `--device`, and numbers by name."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("tokens", help="tokens.safetensors of one of our jobs")
    parser.add_argument("--scheme", default="NVFP4")
    parser.add_argument("--recipe", default=recipes[0], choices=recipes)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def read_calibration(path: str) -> list[list[int]]:
    """The calibration sequences of a job's `tokens.safetensors`."""
    stored = load_file(path)
    ends = np.cumsum(stored["calibration.lengths"])
    return [part.tolist() for part in np.split(stored["calibration.tokens"], ends[:-1])]


def report(calibrating_seconds: float, saving_seconds: float, **versions: str) -> None:
    """Prints the line: seconds, the largest memory of this process in bytes, resident and on a GPU, versions."""
    on_gpu = {"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
    print(
        json.dumps(
            {
                "calibrating_seconds": calibrating_seconds,
                "saving_seconds": saving_seconds,
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                **on_gpu,
                **versions,
            }
        )
    )
