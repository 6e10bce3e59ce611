"""`fourge evaluate` by the walk beside lm-eval's `hf` model: offloaded to disk under the same limit, and in memory.

First a model at least twice as large as the limit, both lanes, beside `hf` in memory; then how seconds and bytes grow
with layers and with requests. Whole processes are timed, imports included; CPU seconds are what a busy machine leaves
comparable. Files are dropped from the page cache before each run, but may stay there during it: `hf` reads its
offloaded weights again and again, and does so from memory where the machine has some to spare.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import add_tokenizer, llama_config, write_llama

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "evaluate"
DATA = BUILD / "data"
PEER = Path(__file__).with_name("evaluate_hf.py")
TASK, DATASET, CHOICES = "hellaswag", "Rowan/hellaswag", 4
VOCABULARY = 4096
POLL_SECONDS = 0.01
ABOUT_LIMIT = """\
The limit: a process whose memory of its own (RssAnon + RssShmem, what a kernel without swap cannot take back) passes it
is killed, looked at every 10 ms. It needs no rights, where a control group does. The walk runs under RLIMIT_DATA of the
same bytes as well, which the kernel imposes. `hf` is spared that: it maps all files of a checkpoint private and
writable, which RLIMIT_DATA counts though they take no memory.
"""


@dataclass(frozen=True)
class Measured:
    """One process: `report` is its JSON, None where it died, `end` then the last thing that it said."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_resident: int
    disk_bytes: int
    report: dict[str, Any] | None
    end: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights read, from the disk or its cache."""
        assert self.report is not None
        return int(self.report["bytes_read"])


@dataclass(frozen=True)
class Bench:
    """The options of all runs: limit in bytes, micro-batch in tokens, threads, `hf`'s batch and its `max_memory`."""

    limit: int
    micro_batch_tokens: int
    batch_size: int
    offload_memory: str
    threads: int

    def walk(self, model: Path, quantized: Path | None, requests: int) -> Measured:
        """`fourge evaluate` of the model, and of its quantized copy with it where that is given."""
        command = [sys.executable, "-m", "fourge", "evaluate", *([] if quantized is None else [str(quantized)])]
        command += ["--baseline", str(model), "--tasks", TASK, "--num-fewshot", "0", "--engine", "walk", "--json"]
        command += ["--limit", str(requests // CHOICES), "--task-data", str(DATA), "-o", str(BUILD / "scores")]
        command += ["--restart", "--micro-batch-tokens", str(self.micro_batch_tokens), "--threads", str(self.threads)]
        command += ["--compute-dtype", "float32", "--device", "cpu"]
        drop_cached([model] if quantized is None else [model, quantized])
        name = "walk, BF16 alone" if quantized is None else "walk, BF16 and NVFP4"
        measured = self._measure(name, command, self.limit, kernel_limit=True)
        if measured.report is not None:
            measured.report.update(measured.report["evaluations"][0]["cost"])
        return measured

    def hf(self, model: Path, requests: int, *, offload: bool, limited: bool) -> Measured:
        """lm-eval's `hf` model, offloaded to disk or in memory."""
        command = [sys.executable, str(PEER), str(model), "--task", TASK, "--items", str(requests // CHOICES)]
        command += ["--batch-size", str(self.batch_size)]
        if offload:
            command += ["--offload-folder", str(BUILD / "offload"), "--max-memory", self.offload_memory]
        drop_cached([model])
        name = "hf, disk offload" if offload else "hf, in memory"
        return self._measure(name, command, self.limit if limited else None)

    def _measure(self, name: str, command: list[str], limit: int | None, *, kernel_limit: bool = False) -> Measured:
        print(f"{name} …", file=sys.stderr, flush=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(BUILD / "cache"),
            "ARROW_DEFAULT_MEMORY_POOL": "system",  # its own pool reserves 1 GiB, which RLIMIT_DATA counts
        }
        data_limit = limit if kernel_limit and limit is not None else resource.RLIM_INFINITY
        began = time.monotonic()
        with (BUILD / "stdout").open("w+") as output, (BUILD / "stderr").open("w+") as errors:
            process = subprocess.Popen(
                command,
                cwd=DATA,  # where lm-eval alone finds the data by the dataset's name
                env=environment,
                stdout=output,
                stderr=errors,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit)),
            )
            killed, status, usage = wait_within(process.pid, limit)
            process.returncode = os.waitstatus_to_exitcode(status)
        said, complaint = (BUILD / "stdout").read_text(), (BUILD / "stderr").read_text().strip()
        finished = process.returncode == 0
        return Measured(
            name=name,
            seconds=time.monotonic() - began,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_resident=usage.ru_maxrss * 1024,
            disk_bytes=usage.ru_inblock * 512,
            report=json.loads(said.strip().splitlines()[-1]) if finished else None,
            end="finished" if finished else "killed at the limit" if killed else complaint.splitlines()[-1],
        )


def wait_within(pid: int, limit: int | None) -> tuple[bool, int, resource.struct_rusage]:
    """Waits for a child, killing it where its own memory passes `limit`: whether it was, wait status and usage."""
    killed = False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return killed, status, usage
        if limit is not None and own_memory(pid) > limit:
            os.kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(POLL_SECONDS)


def own_memory(pid: int) -> int:
    """Bytes of a process that no file backs; 0 for one that has ended but was not waited for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def drop_cached(directories: Iterable[Path]) -> None:
    """Lets go of the page cache of all weights in the directories."""
    for file in (file for directory in directories for file in directory.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # what is not yet written stays in the cache
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_task(items: int) -> None:
    """HellaSwag's rows in words that the tokenizer knows, for `--task-data` and for `datasets` itself."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(4000)}" for _ in range(count))

    folder = DATA / DATASET
    folder.mkdir(parents=True)
    for split, count in (("train", 4), ("validation", items)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                row = {"ind": number, "activity_label": words(2), "ctx_a": words(24), "ctx_b": words(6)}
                row |= {"endings": [words(6) for _ in range(CHOICES)], "label": str(rng.randrange(CHOICES))}
                row |= {"ctx": words(4), "source_id": words(1), "split": "val", "split_type": "indomain"}
                file.write(json.dumps(row) + "\n")
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")


def make_models(layers: int, hidden: int) -> tuple[Path, Path, int]:
    """A synthetic Llama, its quantized copy, and the bytes of the former's weights."""
    model, quantized = BUILD / f"model-{layers}", BUILD / f"quantized-{layers}"
    print(f"making a model of {layers} layers …", file=sys.stderr, flush=True)
    write_llama(model, llama_config(hidden, 4 * hidden, layers, hidden // 64, max(1, hidden // 256), VOCABULARY))
    add_tokenizer(model, VOCABULARY)
    command = [sys.executable, "-m", "fourge", "quantize", str(model), "-o", str(quantized), "--method", "max"]
    command += ["--calibration", "random", "--num-calibration-samples", "1", "--num-probe-samples", "0"]
    command += ["--max-seq-length", "64", "--threads", "1", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return model, quantized, sum(file.stat().st_size for file in model.glob("*.safetensors"))


def baseline_scores(measured: Measured) -> dict[str, float]:
    """`acc` and `acc_norm` of the BF16 model, from either tool's report."""
    assert measured.report is not None
    if "scores" in measured.report:
        return {key.partition(",")[0]: value for key, value in measured.report["scores"].items() if "stderr" not in key}
    results = json.loads((BUILD / "scores" / "baseline" / "results.json").read_text())["results"][TASK]
    return {metric: results[f"{metric},none"] for metric in ("acc", "acc_norm")}


def exceed_memory(bench: Bench, layers: int, hidden: int, requests: int) -> bool:
    """Prints how a model larger than the limit fares; whether the walk finished within it."""
    model, quantized, size = make_models(layers, hidden)
    runs = [bench.walk(model, quantized, requests), bench.hf(model, requests, offload=False, limited=True)]
    print(f"## A model of {size / 1e6:.0f} MB under a limit of {bench.limit / 1e6:.0f} MB\n")
    print(f"{size / bench.limit:.2f} times the limit; {layers} layers, {requests} requests, FP32 arithmetic.\n")
    print("| run | peak RSS MB | seconds | CPU s | end |\n|---|---:|---:|---:|---|")
    for run in runs:
        figures = f"{run.peak_resident / 1e6:.0f} | {run.seconds:.1f} | {run.cpu_seconds:.1f}"
        print(f"| {run.name} | {figures} | {run.end} |")
    remove(model, quantized)
    walk, in_memory = runs
    within = walk.report is not None and walk.peak_resident <= bench.limit and size >= 2 * bench.limit
    print(f"\nThe walk completed within the limit: {'yes' if within else 'no'}; ", end="")
    print(f"hf in memory: {'completed' if in_memory.report is not None else 'did not'}\n", flush=True)
    return within


def print_table_head(varied: str) -> None:
    print(f"## Growth with {varied}\n")
    print("Ratios: hf with disk offload / this run.\n")
    print(
        "| layers | requests | model MB | run | seconds | CPU s | weights read MB | from disk MB | peak RSS MB |",
        end="",
    )
    print(" ratio of seconds | of CPU s | of weights read |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")


def compare(bench: Bench, model: Path, quantized: Path, layers: int, requests: int) -> None:
    """Prints the rows of one model and one number of requests; exits where a BF16 score is not the same in all."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    offloaded = bench.hf(model, requests, offload=True, limited=True)
    runs = [offloaded, bench.hf(model, requests, offload=False, limited=False)]
    scores = {run.name: baseline_scores(run) for run in runs if run.report is not None}
    for lane in (None, quantized):
        runs.append(bench.walk(model, lane, requests))
        scores[runs[-1].name] = baseline_scores(runs[-1])
    for run in runs:
        where = f"| {layers} | {requests} | {size / 1e6:.0f} | {run.name} |"
        if run.report is None:
            print(f"{where} {run.end} | | | | {run.peak_resident / 1e6:.0f} | | | |")
            continue
        figures = f" {run.seconds:.1f} | {run.cpu_seconds:.1f} | {run.weight_bytes / 1e6:.0f} |"
        figures += f" {run.disk_bytes / 1e6:.0f} | {run.peak_resident / 1e6:.0f} |"
        ratios = " | | |"
        if offloaded.report is not None:
            ratios = f" {offloaded.seconds / run.seconds:.2f} | {offloaded.cpu_seconds / run.cpu_seconds:.2f} |"
            ratios += f" {offloaded.weight_bytes / run.weight_bytes:.2f} |"
        print(where + figures + ratios, flush=True)
    if len({json.dumps(found, sort_keys=True) for found in scores.values()}) > 1:
        sys.exit(f"BF16 scores differ: {scores}")


def remove(*directories: Path) -> None:
    for directory in directories:
        shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-mb", type=int, default=900, help="in 10^6 bytes; packages alone take 600")
    parser.add_argument("--large-layers", type=int, default=60, help="of the model that is larger than the limit")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16], help="none: the larger model is all")
    parser.add_argument("--requests", type=int, nargs="+", default=[48, 144], help="multiples of 4, ascending")
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 256; a layer is 30 MB at 1024")
    parser.add_argument("--batch-size", type=int, default=8, help="of hf")
    parser.add_argument("--offload-memory", default="40MB", help="weights that hf with disk offload keeps in memory")
    parser.add_argument("--micro-batch-tokens", type=int, default=256, help="of the walk")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    shutil.rmtree(BUILD, ignore_errors=True)
    write_task(max(options.requests) // CHOICES)
    limit = options.limit_mb * 10**6
    bench = Bench(limit, options.micro_batch_tokens, options.batch_size, options.offload_memory, options.threads)
    print(ABOUT_LIMIT)
    within = exceed_memory(bench, options.large_layers, options.hidden, options.requests[0])
    if options.layers:
        show_growth(bench, options)
    shutil.rmtree(BUILD)
    sys.exit(0 if within else 1)


def show_growth(bench: Bench, options: argparse.Namespace) -> None:
    """Prints how seconds and bytes grow with layers, then with requests."""
    print_table_head("layers")
    for layers in options.layers:
        model, quantized, _ = make_models(layers, options.hidden)
        compare(bench, model, quantized, layers, options.requests[0])
        remove(model, quantized)
    print()
    print_table_head("requests")
    model, quantized, _ = make_models(options.layers[0], options.hidden)
    for requests in options.requests[1:]:
        compare(bench, model, quantized, options.layers[0], requests)
    print("\nBF16 scores are the same in every run of a row's group.")


if __name__ == "__main__":
    main()
