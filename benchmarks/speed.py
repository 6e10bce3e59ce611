"""MB of BF16 a second from file to file: weight-only quantization by every tool, beside copies of the same directory.

A synthetic checkpoint of 1B width (few layers: rates do not depend on how many), the same for all, in turn, whole
processes, imports included; the page cache is warm. Rates are of the source's bytes over a tool's own seconds: of the
working function (`working`), and of the process (`process`), which is what a user waits for. `--calibrated` adds the
W4A4 job: ours, llm-compressor's `oneshot` on the same tokens, and a bound, the model's own forward passes in
transformers over what our lanes run: calibration once, and the probe twice, with the logits that its KL is of.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from measured import run_measured
from synthetic import add_tokenizer, llama_config, write_llama

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "speed"
PEERS = Path(__file__).parent / "peers"

FORWARDS = """
import json, sys, time, torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
import numpy as np
model, tokens, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
stored = load_file(tokens)
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
clocks = np.array([time.monotonic(), time.process_time()])
with torch.no_grad():
    for name, forwards in (("calibration", [model.model]), ("probe", [model, model])):
        for part in np.split(stored[name + ".tokens"], np.cumsum(stored[name + ".lengths"])[:-1]):
            for forward in forwards:
                forward(torch.from_numpy(part.astype(np.int64))[None], use_cache=False)
seconds, cpu_seconds = np.array([time.monotonic(), time.process_time()]) - clocks
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))
"""


@dataclass(frozen=True)
class Measured:
    """One process: its wall and CPU seconds, what it said of itself, its peak."""

    wall: float
    cpu: float
    working: float
    peak: float


def run(command: list[str]) -> Measured:
    """Runs a command that ends with a JSON line; its output goes to a log."""
    process = run_measured(command, BUILD / "log")
    report = json.loads(process.last_line)
    working = report.get("seconds") or report["calibrating_seconds"] + report["saving_seconds"]
    return Measured(process.seconds, process.cpu_seconds, working, report["peak_resident_bytes"])


def weight_only(options: argparse.Namespace, model: Path, tokens: Path) -> dict[str, list[str]]:
    """Tool → command."""
    threads = ["--threads", str(options.threads)]

    def ours(method: str, backend: str) -> list[str]:
        command = [sys.executable, "-m", "fourge", "quantize", str(model), "-o", str(BUILD / "out"), "--json"]
        return [*command, "--restart", "--scheme", "NVFP4A16", "--method", method, "--backend", backend, *threads]

    commands = {
        "fourge max": ours("max", "auto"),
        "fourge search": ours("search", "auto"),
        "fourge max, torch loops": ours("max", "torch"),
    }
    peers = {
        "llm-compressor model_free_ptq": (options.llmcompressor_python, "llmcompressor_model_free.py", []),
        "llm-compressor oneshot": (options.llmcompressor_python, "llmcompressor_oneshot.py", [str(tokens)]),
        "Model-Optimizer": (options.modelopt_python, "modelopt_export.py", [str(tokens)]),
        "AutoRound, no tuning": (options.autoround_python, "autoround_export.py", [str(tokens), "--iterations", "0"]),
    }
    for name, (python, script, more) in peers.items():
        if python:
            # AutoRound's W4A4 scheme alone is exported in this layout; its RTN never looks at a token.
            scheme = "NVFP4" if name.startswith("AutoRound") else "NVFP4A16"
            command = [python, str(PEERS / script), str(model), str(BUILD / "out"), *more]
            commands[name] = [*command, "--scheme", scheme, *threads]
    return commands


def calibrate(options: argparse.Namespace, model: Path, keep: Path) -> list[str]:
    """Our W4A4 job under max calibration, its directory kept for the tokens."""
    command = [sys.executable, "-m", "fourge", "quantize", str(model), "-o", str(keep), "--json", "--restart"]
    command += ["--method", "max", "--calibration", "random", "--num-calibration-samples", str(options.samples)]
    command += ["--num-probe-samples", "1", "--max-seq-length", str(options.length)]
    return [*command, "--threads", str(options.threads)]


COPIES = {
    "cp and sync": "cp -r {model} {out} && sync -f {out}",
    "dd, forced to disk": "mkdir {out} && cat {model}/*.safetensors | dd of={out}/copy bs=16M conv=fsync status=none",
}
"""Copies of the source through a shell; `cp` may leave the work to the file system."""


def copy_seconds(command: str, model: Path) -> float:
    out = BUILD / "out"
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(command.format(model=shlex.quote(str(model)), out=shlex.quote(str(out))), shell=True, check=True)
    return time.monotonic() - began


def forward_passes(options: argparse.Namespace, model: Path, tokens: Path) -> dict[str, float]:
    """`seconds` and `cpu_seconds` of the bound."""
    command = [sys.executable, "-c", FORWARDS, str(model), str(tokens), str(options.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def calibrated_line(options: argparse.Namespace, model: Path, keep: Path, ours: Measured) -> str:
    """The W4A4 job beside its bound and, where it is installed, `oneshot`; `ours` counts as one round."""
    tokens = keep / ".fourge" / "tokens.safetensors"
    bounds = []
    for _ in range(options.rounds):
        bounds.append(forward_passes(options, model, tokens))
        ours = min(ours, run(calibrate(options, model, keep)), key=lambda seen: seen.working)
    bound = min(bounds, key=lambda seen: seen["seconds"])
    line = (
        f"W4A4, {options.samples} × {options.length} tokens and one probe sequence: {ours.working:.1f} s, "
        f"{ours.working / bound['seconds']:.2f} times its forward passes, {bound['seconds']:.1f} s "
        f"(process {ours.cpu:.1f} CPU s, passes {bound['cpu_seconds']:.1f})"
    )
    if not options.llmcompressor_python:
        return line
    shutil.rmtree(BUILD / "out", ignore_errors=True)
    script = str(PEERS / "llmcompressor_oneshot.py")
    command = [options.llmcompressor_python, script, str(model), str(BUILD / "out"), str(tokens)]
    peer = run([*command, "--threads", str(options.threads)])
    return f"{line}; oneshot {peer.working:.1f} s, {peer.peak / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for tool in ("llmcompressor", "modelopt", "autoround"):
        parser.add_argument(f"--{tool}-python", help="Python of its environment; left out, so is its row")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="the fastest of so many counts")
    parser.add_argument("--calibrated", action="store_true")
    options = parser.parse_args()
    model, keep = BUILD / "model", BUILD / "calibrated"
    write_llama(model, llama_config(2048, 8192, options.layers, 32, 8, 32000))
    add_tokenizer(model, 32000)
    megabytes = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6
    calibrated = run(calibrate(options, model, keep))
    tokens = keep / ".fourge" / "tokens.safetensors"
    rows: dict[str, Measured] = {}
    copies = dict.fromkeys(COPIES, float("inf"))
    for _ in range(options.rounds):
        for name, command in COPIES.items():
            copies[name] = min(copies[name], copy_seconds(command, model))
        for name, arguments in weight_only(options, model, tokens).items():
            shutil.rmtree(BUILD / "out", ignore_errors=True)
            seen = run(arguments)
            if name not in rows or seen.wall < rows[name].wall:
                rows[name] = seen
            print(f"{name}: {seen.wall:.1f} s, {seen.cpu:.1f} CPU s", file=sys.stderr, flush=True)
    line = calibrated_line(options, model, keep, calibrated) if options.calibrated else ""
    free = rows.get("llm-compressor model_free_ptq")
    print(
        f"{megabytes:.0f} MB of BF16, {options.layers} layers of 1B width, {options.threads} threads; MB/s of BF16 in"
    )
    print(f"{'':30} {'working':>8} {'process':>8} {'CPU s':>7} {'peak RSS MB':>12} {'of model_free_ptq':>18}")
    for name, seconds in copies.items():
        print(f"{name:30} {megabytes / seconds:>8.0f}")
    for name, seen in rows.items():
        ratio = f"{free.working / seen.working:>18.1f}" if free else ""
        rates = f"{megabytes / seen.working:>8.1f} {megabytes / seen.wall:>8.1f} {seen.cpu:>7.1f}"
        print(f"{name:30} {rates} {seen.peak / 1e6:>12.0f} {ratio}")
    print(line)
    shutil.rmtree(BUILD)


if __name__ == "__main__":
    main()
