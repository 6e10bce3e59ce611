"""The rows of the fidelity table: which tool, told what, by which command."""

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

PEER_SCRIPTS = Path(__file__).resolve().parent / "peers"
DENOMINATOR = "max"
"""The method of ours that every result is compared with, and that runs first."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: a tool and what it is told. `label` names the row."""

    tool: str
    label: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """What `--only` is matched against."""
        return f"{self.tool} {self.label}"

    @property
    def slug(self) -> str:
        """A file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


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


def python_of(tool: str, options: argparse.Namespace) -> str | None:
    """The interpreter of a tool's environment, None where there is none."""
    if tool == "fourge":
        return sys.executable
    chosen: str | None = vars(options)[tool]
    return chosen


def cells(options: argparse.Namespace) -> list[Cell]:
    """All rows asked for, `max` of ours first; says which tools have no environment here."""
    methods = [DENOMINATOR, *(method for method in options.methods if method != DENOMINATOR)]
    ours = [Cell("fourge", method, ("--method", *shlex.split(method))) for method in methods]
    tuned = [
        Cell("AutoRound", f"{count} iterations", ("--iterations", str(count))) for count in options.autoround_iterations
    ]
    for tool in SCRIPTS:
        if python_of(tool, options) is None:
            print(f"{tool} is left out: its Python is not named", flush=True)
    rows = [*(cell for cell in (*tuned, *PEERS) if python_of(cell.tool, options)), *ours[1:]]
    wanted = [cell for cell in rows if re.search(options.only, cell.name)]
    return [ours[0], *sorted(wanted, key=lambda cell: not re.search(options.first, cell.name))]


def command(cell: Cell, options: argparse.Namespace, output: Path, tokens: Path) -> list[str]:
    """The command that makes the cell's checkpoint in `output`, by a peer on the calibration tokens in `tokens`."""
    python = python_of(cell.tool, options)
    assert python is not None
    where = ["--threads", str(options.threads), "--device", options.device]
    if cell.tool == "fourge":
        sizes = ["--num-calibration-samples", str(options.samples), "--num-probe-samples", str(options.probes)]
        sizes += ["--max-seq-length", str(options.length), "--seed", str(options.seed)]
        sizes += ["--micro-batch-tokens", str(options.micro_batch_tokens)]
        texts = ["--calibration", options.calibration, *(["--probe", options.probe] if options.probe else [])]
        made = [python, "-m", "fourge", "quantize", str(options.model), "-o", str(output), *cell.arguments]
        return [*made, *texts, *sizes, *where, "--json"]
    script = PEER_SCRIPTS / SCRIPTS[cell.tool]
    return [python, str(script), str(options.model), str(output), str(tokens), *cell.arguments, *where]
