"""`fourge quantize` beside llm-compressor's `oneshot`: one model, one set of calibration tokens, one machine.

They run in turn, `--rounds` times; the table gives the medians and their ratio. Whole processes are timed, imports
and loading included, for that is what a user waits for. Ours runs in FP32, its default on a CPU, and in BF16.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from synthetic import add_tokenizer, llama_config, write_llama

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "quantize"
PEER = Path(__file__).parent / "peers" / "llmcompressor_oneshot.py"


def timed(command: list[str]) -> tuple[float, dict[str, float]]:
    """Wall seconds of a process and the JSON on the last line of its standard output."""
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.monotonic() - began, json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with llm-compressor")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: eight synthetic layers of 1B width")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = options.model
    if model is None:
        model = BUILD / "model"
        write_llama(model, llama_config(2048, 8192, 8, 32, 8, 32000))
        add_tokenizer(model, 32000)
    ours = [sys.executable, "-m", "fourge", "quantize", str(model), "-o", str(BUILD / "ours"), "--json", "--restart"]
    ours += ["--method", "max"]  # the recipe that both tools have
    ours += ["--calibration", "random", "--num-calibration-samples", str(options.samples), "--num-probe-samples", "1"]
    ours += ["--max-seq-length", str(options.length), "--input-headroom", "1", "--threads", str(options.threads)]
    tokens = BUILD / "ours" / ".fourge" / "tokens.safetensors"
    theirs = [options.peer_python, str(PEER), str(model), str(BUILD / "theirs"), str(tokens)]
    theirs += ["--threads", str(options.threads)]
    commands = {
        "fourge, float32": [*ours, "--compute-dtype", "float32"],
        "fourge, bfloat16": [*ours, "--compute-dtype", "bfloat16"],
        "llm-compressor": theirs,
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, command in commands.items():
            seconds, report = timed(command)
            times[name].append(seconds)
            peaks[name] = max(peaks.get(name, 0), report["peak_resident_bytes"])
    shutil.rmtree(BUILD)
    peer = statistics.median(times["llm-compressor"])
    print(
        f"{'tool':<18} {'seconds (median)':>17} {'min':>7} {'max':>7} {'peak RSS GB':>12} {'llm-compressor / it':>20}"
    )
    for name, seen in times.items():
        median = statistics.median(seen)
        spread = f"{median:>17.1f} {min(seen):>7.1f} {max(seen):>7.1f}"
        print(f"{name:<18} {spread} {peaks[name] / 1e9:>12.2f} {peer / median:>20.2f}")
    print("fourge also runs the probe sequence through both models; llm-compressor computes in bfloat16")


if __name__ == "__main__":
    main()
