"""What a model keeps under every method and every other tool, at equal calibration tokens, judged by one evaluator.

    python benchmarks/fidelity.py MODEL --calibration c4.txt --probe wiki.txt --methods max search "gptq --smooth" \\
        --llmcompressor-python … --modelopt-python … --autoround-python … [--device cuda --jobs 8]
    python benchmarks/fidelity.py --table

The first run of ours chooses the tokens; every other tool gets the same ids. Each checkpoint is scored by
`fidelity_eval.py`, which knows nothing of ours. Every result is a JSON file of its own under `--results`, so a finished
one is not computed again, and the table can be made in several sittings. A tool without an environment is left out.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from fidelity_cells import Cell, cells, command
from fidelity_table import print_tables
from measured import Measured, kill_running, run_measured

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "fidelity"
OURS = ("max", "search", "gptq", "replay --smooth", "tuned --smooth")


class OtherTokensError(Exception):
    """A row on other tokens than the rest: give another `--name`, or delete the results."""


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

    def run(self) -> None:
        """Every row that has no result yet, `--jobs` at once; the first alone where it chooses everybody's tokens."""
        self.results.mkdir(parents=True, exist_ok=True)
        rows = cells(self.options)
        if not self.tokens.exists():
            self.settle(rows.pop(0))
        with ThreadPoolExecutor(self.options.jobs) as pool:
            try:
                list(pool.map(self.settle, rows))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                kill_running()
                raise

    def settle(self, cell: Cell) -> None:
        """The cell's result into its file, unless it is there."""
        file = self.results / f"{cell.slug}.json"
        if file.exists() and not (self.options.again and re.search(self.options.only, cell.name)):
            return
        print(f"{self.name}: {cell.tool}, {cell.label} …", flush=True)
        try:
            result = self.measure(cell)
        except (subprocess.SubprocessError, OtherTokensError) as error:
            # A tool that cannot do it is a finding, and no reason to lose the other rows.
            result = {"failed": reason(error)}
            print(f"{self.name}: {cell.tool}, {cell.label} failed ({reason(error)}); see {self.log(cell)}", flush=True)
        setting = {"device": self.options.device, "jobs": self.options.jobs}
        file.write_text(json.dumps({"tool": cell.tool, "label": cell.label, **setting, **result}, indent=1))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Makes the cell's checkpoint, scores it, deletes it."""
        output = self.work / cell.slug
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        made = self.process(cell, command(cell, self.options, output, self.tokens))
        report = json.loads(made.last_line)
        chosen_on = self.keep_tokens(output / ".fourge" / "tokens.safetensors") if cell.tool == "fourge" else 0
        checkpoint = self.in_compressed_tensors(cell, output)
        scored = self.process(cell, self.evaluator(checkpoint))
        for folder in {output, checkpoint}:
            shutil.rmtree(folder)
        cost = {"seconds": made.seconds, "cpu_seconds": made.cpu_seconds, "peak_resident_bytes": made.peak_bytes}
        return {**cost, "validation_tokens": chosen_on, "scores": json.loads(scored.last_line), "report": report}

    def log(self, cell: Cell) -> Path:
        return self.results / f"{cell.slug}.log"

    def process(self, cell: Cell, arguments: list[str]) -> Measured:
        """One of the cell's processes, its messages into the cell's log."""
        return run_measured(arguments, self.log(cell), self.options.timeout)

    def evaluator(self, checkpoint: Path) -> list[str]:
        """The command that scores a checkpoint. A CPU keeps the source's logits; a GPU is faster than a disk."""
        options = self.options
        arguments = [str(HERE / "fidelity_eval.py"), str(options.model), str(checkpoint), str(self.tokens)]
        arguments += ["--threads", str(options.threads), "--device", options.device]
        cache = ["--cache", str(self.work / "source-logits")] if options.device == "cpu" else []
        return [sys.executable, *arguments, *cache]

    def in_compressed_tensors(self, cell: Cell, output: Path) -> Path:
        """Model-Optimizer's layout is not transformers': the same values in the other one."""
        if cell.tool != "Model-Optimizer":
            return output
        converted = output.with_name(output.name + "-converted")
        shutil.rmtree(converted, ignore_errors=True)
        convert = [sys.executable, "-m", "fourge", "convert", str(output), "--layout", "compressed-tensors"]
        self.process(cell, [*convert, "-o", str(converted), "--json"])
        return converted

    def keep_tokens(self, made: Path) -> int:
        """The first run's tokens are everybody's; raises OtherTokensError where a later run chose others.

        Returns how many validation tokens this run of ours had besides, for what it decides on held-out text.
        """
        if not self.tokens.exists():
            shutil.copy(made, self.tokens)
        ours, theirs = load_file(made), load_file(self.tokens)
        for role in ("calibration", "probe"):
            if ours[f"{role}.tokens"].tobytes() != theirs[f"{role}.tokens"].tobytes():
                raise OtherTokensError(f"{self.tokens} holds other {role} tokens")
        return sum(len(tokens) for name, tokens in ours.items() if name == "validation.tokens")


def reason(error: Exception) -> str:
    """Why a row failed, in a few words."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    return "timeout" if isinstance(error, subprocess.TimeoutExpired) else str(error)


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
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="of ours: a GPU wants more at once")
    parser.add_argument("--methods", nargs="*", default=OURS, help="of ours, with flags")
    parser.add_argument("--llmcompressor-python", dest="llm-compressor")
    parser.add_argument("--modelopt-python", dest="Model-Optimizer")
    parser.add_argument("--autoround-python", dest="AutoRound")
    parser.add_argument("--autoround-iterations", type=int, nargs="*", default=[200])
    parser.add_argument("--only", default="", help="a regular expression on 'tool label': which rows besides max")
    parser.add_argument("--first", default="", help="likewise: which rows before the others, where time may run out")
    parser.add_argument("--again", action="store_true", help="compute finished rows anew")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for every tool and the evaluator")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once; a small model does not fill a GPU")
    parser.add_argument("--timeout", type=float, help="seconds after which a process of a row is killed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=BUILD / "results")
    parser.add_argument("--work", type=Path, default=BUILD / "work")
    parser.add_argument("--table", action="store_true", help="print the tables of all results there are")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if options.model is not None:
        Bench(options, options.name or options.model.name).run()
    if options.table or options.model is None:
        print_tables(options.results)


if __name__ == "__main__":
    main()
