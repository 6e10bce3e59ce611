"""How the work of one quantization divides among ranks, on this machine, and a model of it beyond.

A synthetic Llama is quantized by `replay --smooth` with 1, 2, … ranks of one thread each, and by one process with as
many threads. Compared are the CPU seconds of the busiest rank, imports left out: what the job takes where every rank
has a core of its own and sending costs no waiting. Seconds on the clock, of whole processes, stand beside it; with
fewer free cores than ranks, or with other work on them, they say little. Exits with 1 where outputs differ.

The model: `alone + shared / ranks`, fitted to the busiest rank's seconds.
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
from typing import Any

import numpy as np

from synthetic import llama_config, write_llama

BUILD = Path(__file__).resolve().parents[1] / "build" / "ranks"
BEYOND = (4, 8, 16, 32)


@dataclass(frozen=True)
class Run:
    """One job: CPU seconds of its ranks, imports left out, and seconds on the clock from start to end."""

    cpu: list[float]
    clock: float

    @property
    def busiest(self) -> float:
        return max(self.cpu)


def run(options: dict[str, Any], output: Path, ranks: int, threads: int) -> Run:
    """Starts the ranks as torchrun does, and waits for them."""
    shutil.rmtree(output, ignore_errors=True)
    job = json.dumps({"model": str(BUILD / "model"), "output": str(output), "threads": threads} | options)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    began = time.monotonic()
    started = []
    for rank in range(ranks):
        launch = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        environment = {name: str(value) for name, value in launch.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--as-rank", job]
        started.append(subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started), "a rank failed"
    return Run([float(text) for text in said], time.monotonic() - began)


def be_rank(job: str) -> None:
    """One rank's process: prints its CPU seconds."""
    import torch
    import transformers.models.llama.modeling_llama

    import fourge
    import fourge.nvfp4.numba_loops
    import fourge.walk.run

    assert torch and transformers and fourge.walk.run and fourge.nvfp4.numba_loops
    began = time.process_time()
    fourge.quantize(**json.loads(job))
    print(time.process_time() - began)


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
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.as_rank:
        be_rank(chosen.as_rank)
        return
    write_llama(BUILD / "model", llama_config(chosen.hidden, chosen.intermediate, chosen.layers, 8, 4, 4096))
    options = {
        "method": chosen.method,
        "smooth": True,
        "calibration": "random",
        "micro_batch_tokens": 512,
        "num_calibration_samples": chosen.sequences,
        "num_probe_samples": 4,
        "max_seq_length": chosen.length,
    }
    runs = {ranks: run(options, BUILD / f"{ranks}", ranks, 1) for ranks in chosen.ranks}
    first, most = min(runs), max(runs)
    print(f"{'ranks':>5} {'busiest, CPU s':>15} {'divides by':>11} {'clock s':>8}  each rank's CPU s")
    for ranks, found in runs.items():
        divides, each = runs[first].busiest / found.busiest, ", ".join(f"{seconds:.1f}" for seconds in found.cpu)
        print(f"{ranks:>5} {found.busiest:>15.1f} {divides:>11.2f} {found.clock:>8.1f}  {each}")
    threaded = run(options, BUILD / "threads", 1, most)
    print(f"one process of {most} threads: {threaded.busiest:.1f} CPU s, {threaded.clock:.1f} s on the clock")

    counts = np.array(list(runs), dtype=float)
    terms = np.stack([np.ones_like(counts), 1 / counts], 1)
    alone, shared = np.linalg.lstsq(terms, np.array([found.busiest for found in runs.values()]), rcond=None)[0]
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
