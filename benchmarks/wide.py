"""A 405B model's width on this machine: layers of hidden 16,384 and intermediate 53,248, quantized within 24 GiB.

Writes a checkpoint of that width and few layers, quantizes it in a process of its own with and without calibration,
and prints seconds a layer by stage, peak memory, bytes moved, and what 126 layers would take. The stages are the
functions of the walk with a clock around them, so a stage has what a thread kept from it, and writing, which a thread
does meanwhile, is not part of the sum. Beside it, in the same run, `cp` and `sync` of a layer's file. Exits with 1
where a run took more than 24 GiB.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from synthetic import llama_config

BUILD = Path(__file__).resolve().parents[1] / "build" / "wide"
LAYERS_OF_405B = 126
LIMIT = 24 << 30
ROWS = 1024
POOL = 1 << 26

WEIGHT_ONLY = ["--scheme", "NVFP4A16", "--calibration", "none"]
TOKENS = ["--calibration", "random", "--num-calibration-samples", "2", "--num-probe-samples", "1"]
TOKENS += ["--max-seq-length", "64"]
RUNS = {
    "weight-only, max": [*WEIGHT_ONLY, "--method", "max"],
    "weight-only, search": [*WEIGHT_ONLY, "--method", "search"],
    "W4A4, max, 128 + 64 tokens": [*TOKENS, "--method", "max"],
    "W4A4, search, 128 + 64 tokens": [*TOKENS, "--method", "search"],
}


# The checkpoint


class Values:
    """BF16 weights with what makes real ones hard: rows of different size, and outlier channels.

    Normal values come from one pool, read from another place every time: a layer has 3.2 billion of them.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(POOL, generator=self._generator).bfloat16()

    def blocks(self, rows: int, columns: int) -> Iterator[torch.Tensor]:
        """A weight `[rows, columns]`, some rows at a time."""
        spread = (torch.randn(columns, generator=self._generator) * 0.3).exp()
        spread[torch.rand(columns, generator=self._generator) < 0.002] *= 20
        by_column = (spread / columns**0.5).bfloat16()
        for start in range(0, rows, ROWS):
            count = min(ROWS, rows - start)
            first = int(torch.randint(POOL - count * columns, (1,), generator=self._generator))
            by_row = (torch.randn(count, 1, generator=self._generator) * 0.3).exp().bfloat16()
            yield self._pool[first : first + count * columns].view(count, columns) * by_column * by_row


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], values: Values) -> None:
    """A safetensors file of BF16 tensors, never whole in memory; norms, of one dimension, are ones."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for shape in shapes.values():
            blocks = [torch.ones(shape, dtype=torch.bfloat16)] if len(shape) == 1 else values.blocks(*shape)
            for block in blocks:
                file.write(block.view(torch.uint8).numpy().data)


def write_wide(directory: Path, config: dict[str, Any]) -> None:
    """A Llama with `config`, a file for each layer, one for the embedding and one for the head."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    files = {"embedding.safetensors": {"model.embed_tokens.weight": (vocab, hidden)}}
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        prefix = f"model.layers.{layer}."
        files[layer_file(layer)] = {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
    files["head.safetensors"] = {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    values = Values()
    for name, shapes in files.items():
        write_file(directory / name, shapes, values)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


# One quantization, in a process of its own, with clocks


class Clocks:
    """Seconds by stage. Whatever runs within a stage counts there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = 0

    def around(self, owner: Any, name: str, stage: str, *, of_a_thread: bool = False) -> None:
        """Has `owner.name` add its time to `stage`."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if of_a_thread:
                with self._timing(stage):
                    return function(*arguments, **options)
            self._within += 1
            try:
                if self._within > 1:
                    return function(*arguments, **options)
                with self._timing(stage):
                    return function(*arguments, **options)
            finally:
                self._within -= 1

        setattr(owner, name, timed)

    @contextmanager
    def _timing(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - began


def quantize_here(arguments: list[str]) -> None:
    """`fourge quantize` with clocks; prints a JSON line with what they say and what the process moved."""
    import typer

    import fourge.cli
    from fourge.walk import job, layer_step, run, source_digests, steps, weight_step

    clocks = Clocks()
    clocks.around(run, "require_finite_ends", "embedding and head looked at")
    clocks.around(weight_step.GroupReader, "read", "reading")
    clocks.around(steps, "read_layer", "reading")
    clocks.around(weight_step, "quantize_by_rows", "rounding")
    clocks.around(layer_step, "quantize_by_rows", "rounding")
    clocks.around(layer_step.LayerStep, "_run", "lanes")
    clocks.around(steps.OneBehind, "wait", "waiting for the shard")
    clocks.around(source_digests.SourceDigests, "finish", "waiting for digests")
    clocks.around(steps, "write_safetensors", "writing, meanwhile", of_a_thread=True)
    clocks.around(job.Job, "commit", "committing, meanwhile", of_a_thread=True)
    try:
        fourge.cli.app(arguments, standalone_mode=False)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    moved = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report = {
        "stages": clocks.seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
        "read": int(moved["rchar"]),
        "written": int(moved["wchar"]),
        "read_from_disk": int(moved["read_bytes"]),
    }
    print(json.dumps(report))


@dataclass(frozen=True)
class Measured:
    """One run at one depth: seconds of the process and of its layers' steps, and the report of `quantize_here`.

    `copying`: bytes a second of `cp` just before.
    """

    layers: int
    source_bytes: int
    copying: float
    seconds: float
    step_seconds: list[float]
    report: dict[str, Any]


def quantize(model: Path, layers: int, options: list[str], threads: int, drop: bool) -> Measured:
    """Quantizes `model`; what was written is deleted."""
    output = BUILD / "out"
    shutil.rmtree(output, ignore_errors=True)
    source_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    copying = copy_rate(model)
    if drop:
        drop_from_cache(model)
    command = [sys.executable, __file__, "--child", "quantize", str(model), "-o", str(output), *options]
    began = time.monotonic()
    command += ["--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - began
    log = [json.loads(line) for line in (output / ".fourge" / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["seconds"] for entry in log if entry["name"].startswith("layer ")]
    shutil.rmtree(output)
    return Measured(layers, source_bytes, copying, seconds, steps, json.loads(done.stdout.splitlines()[-1]))


def drop_from_cache(directory: Path) -> None:
    """Has the system forget what it holds of the files, so that they are read from the disk."""
    os.sync()
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_rate(model: Path) -> float:
    """Bytes/s of `cp` and `sync` of a layer's file that is read from the disk."""
    source, target = model / layer_file(0), BUILD / "copy"
    drop_from_cache(model)
    began = time.monotonic()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.monotonic() - began
    target.unlink()
    return source.stat().st_size / seconds


# What it says


def describe(run: Measured) -> str:
    """A run in three lines, its rate beside that of `cp` just before it."""
    report, rate = run.report, run.source_bytes / run.seconds
    said = [
        f"{run.layers} layers: {run.seconds:.0f} s, {report['cpu']:.0f} CPU s",
        f"peak {report['peak'] / 1e9:.2f} GB",
        f"read {report['read'] / 1e9:.1f} GB, of them {report['read_from_disk'] / 1e9:.1f} from the disk",
        f"written {report['written'] / 1e9:.1f} GB",
        f"{rate / 1e6:.0f} MB/s of source, {rate / run.copying:.2f} of cp's {run.copying / 1e6:.0f}",
    ]
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in sorted(report["stages"].items()))
    steps = ", ".join(f"{seconds:.1f}" for seconds in run.step_seconds)
    return f"  {'; '.join(said)}\n    seconds by stage, all layers: {stages}\n    seconds a layer's step: {steps}"


def extrapolate(runs: list[Measured], layer_bytes: int) -> str:
    """What 126 layers would take, from the runs of one kind at several depths, the deepest last."""
    deepest = runs[-1]
    more = LAYERS_OF_405B - deepest.layers
    layer = statistics.median(seconds for run in runs for seconds in run.step_seconds)
    total = deepest.seconds + more * layer
    rate = (deepest.source_bytes + more * layer_bytes) / total
    text = f"{LAYERS_OF_405B} layers, {layer:.1f} s each: {total / 3600:.2f} h, {rate / 1e6:.0f} MB/s"
    if len(runs) > 1:
        cpu = (deepest.report["cpu"] - runs[0].report["cpu"]) / (deepest.layers - runs[0].layers)
        text += f"; {cpu:.0f} CPU s each, {cpu * LAYERS_OF_405B / 3600:.2f} h of one core"
    return text


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        quantize_here(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm", action="store_true", help="leave the source in the page cache")
    parser.add_argument("--shrink", type=int, default=1, help="divide every size by this: to try the benchmark itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hidden, intermediate = 16384 // options.shrink, 53248 // options.shrink
    vocab, heads = 128256 // options.shrink, 128 // options.shrink
    model = BUILD / "model"
    measured: dict[str, list[Measured]] = defaultdict(list)
    for layers in options.layers:
        began = time.monotonic()
        write_wide(model, llama_config(hidden, intermediate, layers, heads, min(8, heads), vocab))
        print(f"{layers} layers written in {time.monotonic() - began:.0f} s", flush=True)
        for name in options.runs:
            measured[name].append(quantize(model, layers, RUNS[name], options.threads, not options.warm))
            print(f"{name}\n{describe(measured[name][-1])}", flush=True)
    layer_bytes = (model / layer_file(0)).stat().st_size
    shutil.rmtree(BUILD)
    print(f"\n{options.threads} threads; a layer has {layer_bytes / 1e9:.2f} GB")
    for name, runs in measured.items():
        print(f"{name}: {extrapolate(runs, layer_bytes)}")
    print(
        f"Assumed for {LAYERS_OF_405B} layers: each takes the median of these, on a machine as busy, with a disk as "
        "fast and tokens as few (time in the lanes grows with them); the peak does not grow with depth."
    )
    peak = max(run.report["peak"] for runs in measured.values() for run in runs)
    print(f"largest peak {peak / 1e9:.2f} GB = {peak / 2**30:.2f} GiB, at most {LIMIT >> 30} GiB")
    sys.exit(0 if peak <= LIMIT else 1)


if __name__ == "__main__":
    main()
