"""A 405B model's width on this machine: layers of hidden 16,384 and intermediate 53,248, quantized within 24 GiB.

Writes a checkpoint of that width and few layers, quantizes it in a process of its own with and without calibration,
and prints seconds a layer by stage, peak memory, bytes moved, and what 126 layers would take: with as many tokens, and
with the 512 × 2,048 of a real run, for which the stages that grow with the tokens are multiplied. Beside it, in the
same run, `cp` and `sync` of a layer's file. Exits with 1 where a run took more than 24 GiB of the host's memory.

    python benchmarks/wide.py --device cuda --layers 2 --runs "W4A4, replay" --samples 32 --length 2048
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from synthetic import llama_config
from wide_model import layer_file, write_wide
from wide_run import WITH_TOKENS

BUILD = Path(__file__).resolve().parents[1] / "build" / "wide"
LAYERS_OF_405B = 126
TOKENS_OF_A_RUN = 512 * 2048
LIMIT = 24 << 30

WEIGHT_ONLY = ["--scheme", "NVFP4A16", "--calibration", "none"]
RUNS = {
    "weight-only, max": [*WEIGHT_ONLY, "--method", "max"],
    "weight-only, search": [*WEIGHT_ONLY, "--method", "search"],
    "W4A4, max": ["--method", "max"],
    "W4A4, search": ["--method", "search"],
    "W4A4, replay": ["--method", "replay", "--smooth"],
    "W4A4, best": ["--recipe", "best"],
}
USUAL = list(RUNS)[:4]


def token_options(samples: int, length: int) -> list[str]:
    """Sets in the proportions of a run's defaults: an eighth to validate on, a sixteenth to probe."""
    options = ["--calibration", "random", "--max-seq-length", str(length), "--num-calibration-samples", str(samples)]
    options += ["--num-validation-samples", str(max(1, samples // 8))]
    return [*options, "--num-probe-samples", str(max(1, samples // 16))]


@dataclass(frozen=True)
class Measured:
    """One run at one depth: seconds of the process and of its layers' steps, and the report of `wide_run.py`.

    `copying`: bytes a second of `cp` just before, where the source was dropped from the page cache.
    """

    layers: int
    source_bytes: int
    copying: float | None
    seconds: float
    step_seconds: list[float]
    report: dict[str, Any]

    @property
    def layer_stages(self) -> dict[str, float]:
        """Seconds by stage of the last layer: the first is the one in which kernels are compiled."""
        stages: dict[str, float] = self.report["stages"][self.layers]
        return stages


def quantize(model: Path, build: Path, layers: int, options: list[str], cold: bool) -> Measured:
    """Quantizes `model`, not from the page cache where `cold`; what was written is deleted."""
    output = build / "out"
    shutil.rmtree(output, ignore_errors=True)
    source_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    copying = None
    os.sync()
    if cold:
        copying = copy_rate(model, build)
        drop_from_cache(model)
    script = str(Path(__file__).with_name("wide_run.py"))
    command = [sys.executable, script, "quantize", str(model), "-o", str(output), *options]
    began = time.monotonic()
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


def copy_rate(model: Path, build: Path) -> float:
    """Bytes/s of `cp` and `sync` of a layer's file that is read from the disk."""
    source, target = model / layer_file(0), build / "copy"
    drop_from_cache(model)
    began = time.monotonic()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.monotonic() - began
    target.unlink()
    return source.stat().st_size / seconds


# What it says


def describe(run: Measured) -> str:
    """A run in four lines, its rate beside that of `cp` just before it."""
    report, rate = run.report, run.source_bytes / run.seconds
    said = [
        f"{run.layers} layers: {run.seconds:.0f} s, {report['cpu']:.0f} CPU s",
        f"peak {report['peak'] / 1e9:.2f} GB",
        f"read {report['read'] / 1e9:.1f} GB, of them {report['read_from_disk'] / 1e9:.1f} from the disk",
        f"written {report['written'] / 1e9:.1f} GB",
        f"{rate / 1e6:.0f} MB/s of source",
    ]
    if run.copying is not None:
        said.append(f"{rate / run.copying:.2f} of cp's {run.copying / 1e6:.0f}")
    if report["gpu_peak"] is not None:
        said.append(f"GPU {report['gpu_peak'] / 1e9:.1f} GB, {report['gpu_reserved'] / 1e9:.1f} with what torch kept")
    ends = defaultdict(float)
    for stages in (report["stages"][0], *report["stages"][run.layers + 1 :]):
        for stage, seconds in stages.items():
            ends[stage] += seconds
    steps = ", ".join(f"{seconds:.1f}" for seconds in run.step_seconds)
    return "\n".join(
        [
            f"  {'; '.join(said)}",
            f"    seconds a layer's step: {steps}",
            f"    of the last layer: {_listed(run.layer_stages)}",
            f"    of embedding, head and the end: {_listed(ends)}",
        ]
    )


def _listed(stages: dict[str, float]) -> str:
    return ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items() if seconds >= 0.005)


def extrapolate(runs: list[Measured], layer_bytes: int, tokens: int | None) -> str:
    """What 126 layers would take, from the runs of one kind at several depths, the deepest last."""
    deepest = runs[-1]
    more = LAYERS_OF_405B - deepest.layers
    layer = statistics.median(seconds for run in runs for seconds in run.step_seconds[1:] or run.step_seconds)
    total = deepest.seconds + more * layer
    rate = (deepest.source_bytes + more * layer_bytes) / total
    text = f"{LAYERS_OF_405B} layers, {layer:.1f} s each: {total / 3600:.2f} h, {rate / 1e6:.0f} MB/s"
    if len(runs) > 1:
        cpu = (deepest.report["cpu"] - runs[0].report["cpu"]) / (deepest.layers - runs[0].layers)
        text += f"; {cpu:.0f} CPU s each, {cpu * LAYERS_OF_405B / 3600:.2f} h of one core"
    if tokens is not None:
        stages = deepest.layer_stages
        growing = sum(stages.get(stage, 0.0) for stage in WITH_TOKENS)
        fixed = layer - growing
        real = fixed + growing * TOKENS_OF_A_RUN / tokens
        text += (
            f"\n    with {TOKENS_OF_A_RUN:,} calibration tokens in place of {tokens:,}: {fixed:.1f} s and "
            f"{growing:.1f} × {TOKENS_OF_A_RUN / tokens:.0f} = {real:.0f} s each, {real * LAYERS_OF_405B / 3600:.2f} h"
        )
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=USUAL)
    parser.add_argument("--samples", type=int, default=2, help="calibration sequences of the W4A4 runs")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm", action="store_true", help="leave the source in the page cache, and copy nothing")
    parser.add_argument("--build", type=Path, default=BUILD, help="where everything is written, and deleted")
    parser.add_argument("--source", type=Path, help="where the checkpoint is, if elsewhere")
    parser.add_argument("--vocab", type=int, default=128256, help="fewer: less of embedding and head to write and read")
    parser.add_argument("--shrink", type=int, default=1, help="divide every size by this: to try the benchmark itself")
    parser.add_argument("--json", type=Path, help="where to put the figures as well")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    hidden, intermediate = 16384 // options.shrink, 53248 // options.shrink
    vocab, heads = options.vocab // options.shrink, 128 // options.shrink
    build = options.build
    model = options.source or build / "model"
    build.mkdir(parents=True, exist_ok=True)
    where = ["--device", options.device, "--threads", str(options.threads)]
    where += ["--micro-batch-tokens", str(options.micro_batch_tokens)]
    measured: dict[str, list[Measured]] = defaultdict(list)
    for layers in options.layers:
        began = time.monotonic()
        config = llama_config(hidden, intermediate, layers, heads, min(8, heads), vocab)
        write_wide(model, config, options.device)
        print(f"{layers} layers written in {time.monotonic() - began:.0f} s", flush=True)
        for name in options.runs:
            tokens = [] if name.startswith("weight-only") else token_options(options.samples, options.length)
            measured[name].append(quantize(model, build, layers, [*RUNS[name], *tokens, *where], not options.warm))
            print(f"{name}\n{describe(measured[name][-1])}", flush=True)
            if options.json:
                runs = {name: [asdict(run) for run in runs] for name, runs in measured.items()}
                options.json.write_text(
                    json.dumps({"options": {name: str(value) for name, value in vars(options).items()}, "runs": runs})
                    + "\n"
                )
    layer_bytes = (model / layer_file(0)).stat().st_size
    shutil.rmtree(model)
    shutil.rmtree(build, ignore_errors=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"\n{device}, {options.threads} threads; a layer has {layer_bytes / 1e9:.2f} GB")
    for name, runs in measured.items():
        tokens = None if name.startswith("weight-only") else options.samples * options.length
        print(f"{name}: {extrapolate(runs, layer_bytes, tokens)}")
    print(
        f"Assumed for {LAYERS_OF_405B} layers: each takes the median of these but the first, on a machine as busy, "
        "with a disk as fast; validation and probe grow with calibration; the peak does not grow with depth."
    )
    peak = max(run.report["peak"] for runs in measured.values() for run in runs)
    print(f"largest peak {peak / 1e9:.2f} GB = {peak / 2**30:.2f} GiB, at most {LIMIT >> 30} GiB")
    sys.exit(0 if peak <= LIMIT else 1)


if __name__ == "__main__":
    main()
