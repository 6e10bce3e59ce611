"""How the work of one quantization divides among ranks, on this machine, and a model of it beyond.

A synthetic Llama is quantized by the default recipe with 1, 2, … ranks of one thread each, and by one process with as
many threads. Compared are rank 0's CPU seconds over all steps, from `metrics.jsonl`: it does its share and all that is
not shared, so that is what the job takes where every rank has a core of its own and sending costs no waiting. Seconds
on the clock, of whole processes, stand beside it; with fewer free cores than ranks, or with other work on them, they
say little. Exits with 1 where outputs differ.

The model: `alone + shared / ranks`, fitted to rank 0's seconds.
"""

import argparse
import filecmp
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthetic import llama_config, write_llama

BUILD = Path(__file__).resolve().parents[1] / "build" / "ranks"
BEYOND = (4, 8, 16, 32)


@dataclass(frozen=True)
class Run:
    """One job: rank 0's CPU seconds in the walk, and seconds on the clock from start to end."""

    cpu: float
    clock: float


def run(options: list[str], output: Path, ranks: int, threads: int) -> Run:
    """Starts the ranks as torchrun does, and waits for them."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "fourge", "quantize", str(BUILD / "model"), "-o", str(output), *options]
    command += ["--threads", str(threads)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    began = time.monotonic()
    started = []
    for rank in range(ranks):
        launch = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        environment = {name: str(value) for name, value in launch.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
        started.append(subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL))
    assert all(process.wait() == 0 for process in started), "a rank failed"
    clock = time.monotonic() - began
    lines = (output / ".fourge" / "metrics.jsonl").read_text().splitlines()
    return Run(sum(json.loads(line)["cpu_seconds"] for line in lines), clock)


def same_files(one: Path, two: Path) -> bool:
    """Whether two outputs have the same published files, byte for byte."""
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    return names == sorted(path.name for path in two.iterdir() if path.is_file()) and all(
        filecmp.cmp(one / name, two / name, shallow=False) for name in names
    )


def received(hidden: int, intermediate: int, tokens: int, itemsize: int, ranks: int) -> float:
    """Bytes of inputs that reach every rank a layer, for the Hessians of q/k/v, o, gate/up and down."""
    return tokens * (3 * hidden + intermediate) * itemsize * (ranks - 1) / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="replay")
    chosen = parser.parse_args()
    write_llama(BUILD / "model", llama_config(chosen.hidden, chosen.intermediate, chosen.layers, 8, 4, 4096))
    options = ["--method", chosen.method, "--smooth", "--calibration", "random", "--micro-batch-tokens", "512"]
    options += ["--num-calibration-samples", str(chosen.sequences), "--num-probe-samples", "4"]
    options += ["--max-seq-length", str(chosen.length)]

    runs = {ranks: run(options, BUILD / f"{ranks}", ranks, 1) for ranks in chosen.ranks}
    first, most = min(runs), max(runs)
    print(f"{'ranks':>5} {'rank 0, CPU s':>14} {'divides by':>11} {'clock s':>8}")
    for ranks, found in runs.items():
        print(f"{ranks:>5} {found.cpu:>14.1f} {runs[first].cpu / found.cpu:>11.2f} {found.clock:>8.1f}")
    threaded = run(options, BUILD / "threads", 1, most)
    print(f"one process of {most} threads: {threaded.cpu:.1f} CPU s, {threaded.clock:.1f} s on the clock")

    counts = np.array(list(runs), dtype=float)
    terms = np.stack([np.ones_like(counts), 1 / counts], 1)
    alone, shared = np.linalg.lstsq(terms, np.array([found.cpu for found in runs.values()]), rcond=None)[0]
    print(f"model: {alone:.1f} s that every rank spends + {shared:.1f} s / ranks; so by")
    print("       " + ", ".join(f"{ranks}: {(alone + shared) / (alone + shared / ranks):.1f}" for ranks in BEYOND))
    tokens = chosen.sequences * chosen.length
    here = received(chosen.hidden, chosen.intermediate, tokens, 4, most)
    there = received(16384, 53248, 512 * 2048, 2, 8)
    print(f"received a layer and rank: {here / 1e6:.1f} MB here; {there / 1e9:.0f} GB for Hermes-4-405B in BF16 on 8")
    same = all(same_files(BUILD / f"{first}", BUILD / f"{ranks}") for ranks in chosen.ranks)
    print(f"outputs byte for byte the same: {'yes' if same else 'NO'}")
    shutil.rmtree(BUILD)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
