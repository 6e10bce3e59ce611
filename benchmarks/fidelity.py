"""What a model keeps under every method and every other tool, at equal calibration tokens, judged by one evaluator.

    python benchmarks/fidelity.py MODEL --calibration c4.txt --probe wiki.txt --methods max search "gptq --smooth" \\
        --llmcompressor-python … --modelopt-python … --autoround-python …
    python benchmarks/fidelity.py --table

The first run of ours chooses the tokens; every other tool gets the same ids. Each checkpoint is scored by
`fidelity_eval.py`, which knows nothing of ours. Every result is a JSON file of its own under `--results`, so a finished
one is not computed again, and the table can be made in several sittings. A tool without an environment is left out.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from fidelity_table import print_tables

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "fidelity"
DENOMINATOR = "max"
"""The method of ours that every result is compared with, and that runs first."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: a tool and what it is told. `label` names the row."""

    tool: str
    label: str
    arguments: tuple[str, ...]

    @property
    def slug(self) -> str:
        """A file name."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.tool} {self.label}".lower()).strip("-")


PEERS = (
    Cell("llm-compressor", "RTN", ("--recipe", "rtn")),
    Cell("llm-compressor", "expanded MSE", ("--recipe", "expanded-mse")),
    Cell("llm-compressor", "GPTQ", ("--recipe", "gptq")),
    Cell("llm-compressor", "GPTQ, expanded MSE", ("--recipe", "gptq-expanded-mse")),
    Cell("llm-compressor", "AWQ + GPTQ", ("--recipe", "awq-gptq")),
    Cell("llm-compressor", "AWQ + GPTQ, expanded MSE", ("--recipe", "awq-gptq-expanded-mse")),
    Cell("Model-Optimizer", "max", ("--recipe", "max")),
    Cell("Model-Optimizer", "MSE sweep", ("--recipe", "mse")),
    Cell("Model-Optimizer", "local Hessian", ("--recipe", "local-hessian")),
    Cell("Model-Optimizer", "GPTQ", ("--recipe", "gptq")),
)
SCRIPTS = {
    "llm-compressor": "llmcompressor_oneshot.py",
    "Model-Optimizer": "modelopt_export.py",
    "AutoRound": "autoround_export.py",
}


@dataclass(frozen=True)
class Bench:
    """One model's sitting: where things lie and how the tools are run."""

    options: argparse.Namespace
    name: str

    @property
    def results(self) -> Path:
        return Path(self.options.results) / self.name

    @property
    def work(self) -> Path:
        return Path(self.options.work) / self.name

    @property
    def tokens(self) -> Path:
        return self.results / "tokens.safetensors"

    def cells(self) -> list[Cell]:
        """All rows asked for, `max` of ours first; says which tools have no environment here."""
        methods = [DENOMINATOR, *(m for m in self.options.methods if m != DENOMINATOR)]
        ours = [Cell("fourge", method, ("--method", *shlex.split(method))) for method in methods]
        tuned = [
            Cell("AutoRound", f"{count} iterations", ("--iterations", str(count)))
            for count in self.options.autoround_iterations
        ]
        peers = [*PEERS, *tuned]
        for tool in SCRIPTS:
            if self.python(tool) is None:
                print(f"{tool} is left out: its Python is not named", flush=True)
        wanted = re.compile(self.options.only)
        rows = [ours[0], *(cell for cell in peers if self.python(cell.tool)), *ours[1:]]
        return rows[:1] + [cell for cell in rows[1:] if wanted.search(f"{cell.tool} {cell.label}")]

    def python(self, tool: str) -> str | None:
        """The interpreter of a tool's environment, None where there is none."""
        if tool == "fourge":
            return sys.executable
        chosen: str | None = vars(self.options)[tool]
        return chosen

    def command(self, cell: Cell, output: Path) -> list[str]:
        """The command that makes the cell's checkpoint."""
        options, python = self.options, self.python(cell.tool)
        assert python is not None
        threads = ["--threads", str(options.threads)]
        if cell.tool == "fourge":
            sizes = ["--num-calibration-samples", str(options.samples), "--num-probe-samples", str(options.probes)]
            sizes += ["--max-seq-length", str(options.length), "--seed", str(options.seed)]
            texts = ["--calibration", options.calibration, *(["--probe", options.probe] if options.probe else [])]
            command = [python, "-m", "fourge", "quantize", str(options.model), "-o", str(output), *cell.arguments]
            return [*command, *texts, *sizes, *threads, "--json"]
        script = HERE / "peers" / SCRIPTS[cell.tool]
        return [python, str(script), str(options.model), str(output), str(self.tokens), *cell.arguments, *threads]

    def run(self, cell: Cell) -> dict[str, Any]:
        """Makes the cell's checkpoint, scores it, deletes it."""
        output, log = self.work / cell.slug, self.results / f"{cell.slug}.log"
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        made = run_measured(self.command(cell, output), log)
        report = json.loads(made.last_line)
        chosen_on = self.keep_tokens(output / ".fourge" / "tokens.safetensors") if cell.tool == "fourge" else 0
        checkpoint = self.in_compressed_tensors(cell, output, log)
        evaluator = [sys.executable, str(HERE / "fidelity_eval.py"), str(self.options.model), str(checkpoint)]
        evaluator += [str(self.tokens), "--cache", str(self.work / "source-logits")]
        scores = json.loads(run_measured([*evaluator, "--threads", str(self.options.threads)], log).last_line)
        for folder in {output, checkpoint}:
            shutil.rmtree(folder)
        cost = {"seconds": made.seconds, "cpu_seconds": made.cpu_seconds, "peak_resident_bytes": made.peak_bytes}
        return {**cost, "validation_tokens": chosen_on, "scores": scores, "report": report}

    def in_compressed_tensors(self, cell: Cell, output: Path, log: Path) -> Path:
        """Model-Optimizer's layout is not transformers': the same values in the other one."""
        if cell.tool != "Model-Optimizer":
            return output
        converted = output.with_name(output.name + "-converted")
        shutil.rmtree(converted, ignore_errors=True)
        command = [sys.executable, "-m", "fourge", "convert", str(output), "--layout", "compressed-tensors"]
        run_measured([*command, "-o", str(converted), "--json"], log)
        return converted

    def keep_tokens(self, made: Path) -> int:
        """The first run's tokens are everybody's; a later run that chose others is an error, not a row.

        Returns how many validation tokens this run of ours had besides, for what it decides on held-out text.
        """
        if not self.tokens.exists():
            shutil.copy(made, self.tokens)
        ours, theirs = load_file(made), load_file(self.tokens)
        for role in ("calibration", "probe"):
            if ours[f"{role}.tokens"].tobytes() != theirs[f"{role}.tokens"].tobytes():
                sys.exit(f"{self.tokens} holds other {role} tokens; give another --name, or delete {self.results}")
        return sum(len(tokens) for name, tokens in ours.items() if name == "validation.tokens")


@dataclass(frozen=True)
class Measured:
    """What a process took, and the last line that it printed. On a busy machine CPU seconds are the steadier ones."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    last_line: str


def run_measured(command: list[str], log: Path) -> Measured:
    """Runs a process to its end, its messages into `log`; raises CalledProcessError where it fails."""
    began = time.monotonic()
    with log.open("a") as messages:
        messages.write(f"$ {shlex.join(command)}\n")
        messages.flush()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        assert process.stdout is not None
        try:
            output = process.stdout.read()
        except BaseException:
            # Left behind, it would go on writing where the next run of the same row writes.
            process.kill()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        messages.write(output)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.monotonic() - began
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Measured(seconds, cpu_seconds, usage.ru_maxrss * 1024, output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a BF16 checkpoint")
    parser.add_argument("--name", help="what the table calls the model [default: its directory's name]")
    parser.add_argument("--calibration", default="self", help="as `fourge quantize` takes it")
    parser.add_argument("--probe", help="held-out text, if not from the calibration's source")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--probes", type=int, default=16, help="held-out sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=["max", "search", "gptq", "replay"], help="of ours, with flags")
    parser.add_argument("--llmcompressor-python", dest="llm-compressor")
    parser.add_argument("--modelopt-python", dest="Model-Optimizer")
    parser.add_argument("--autoround-python", dest="AutoRound")
    parser.add_argument("--autoround-iterations", type=int, nargs="*", default=[200])
    parser.add_argument("--only", default="", help="a regular expression on 'tool label': which rows besides max")
    parser.add_argument("--again", action="store_true", help="compute finished rows anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=BUILD / "results")
    parser.add_argument("--work", type=Path, default=BUILD / "work")
    parser.add_argument("--table", action="store_true", help="print the tables of all results there are")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if options.model is not None:
        bench = Bench(options, options.name or options.model.name)
        bench.results.mkdir(parents=True, exist_ok=True)
        for cell in bench.cells():
            file = bench.results / f"{cell.slug}.json"
            if file.exists() and not (options.again and re.search(options.only, f"{cell.tool} {cell.label}")):
                continue
            print(f"{bench.name}: {cell.tool}, {cell.label} …", flush=True)
            try:
                result = bench.run(cell)
            except subprocess.CalledProcessError as error:
                # A tool that cannot do it is a finding, and no reason to lose the other rows.
                print(f"  failed ({error.returncode}); see {file.with_suffix('.log')}", flush=True)
                result = {"failed": error.returncode}
            file.write_text(json.dumps({"tool": cell.tool, "label": cell.label, **result}, indent=1))
    if options.table or options.model is None:
        print_tables(options.results)


if __name__ == "__main__":
    main()
