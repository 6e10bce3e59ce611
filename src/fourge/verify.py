"""`fourge verify`: whether a quantized checkpoint can be trusted, one check after the other."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourge.checks.report import Check, skipped
from fourge.errors import InputError
from fourge.quantize import resolve_device
from fourge.settings import ComputeDtype

if TYPE_CHECKING:
    import numpy as np

    from fourge.checkpoint.reader import Checkpoint
    from fourge.checks.config import Quantization
    from fourge.checks.deep import DeepResult
    from fourge.checks.expected import Expected
    from fourge.walk.job import Manifest

_MICRO_BATCH_TOKENS = 2048

CHECKS = (
    *("files", "digests", "config", "tensors", "tensor_parallel", "scales", "fused_groups"),
    *("sidecars", "source_config", "unquantized", "dequantized", "deep"),
)
"""The names of all checks, in the order of the report."""
_NEED_SOURCE = ("sidecars", "source_config", "unquantized", "dequantized")


@dataclass(frozen=True)
class VerifyReport:
    """Every check of `CHECKS`, in that order; `passed` when none failed.

    With `--deep`, `fidelity` is the probe's KL, top-1 agreement and perplexities (as in `QuantizeResult`) and
    `hidden_errors` the relative error of the hidden states after each layer, both with standard errors.
    """

    output: Path
    passed: bool
    checks: tuple[Check, ...]
    fidelity: dict[str, Any] | None
    hidden_errors: list[dict[str, Any]]


@dataclass(frozen=True)
class ProbeOptions:
    """How `--deep` gets its tokens and computes; field names are the options'. `probe` None takes the job's."""

    probe: str | None
    num_probe_samples: int
    max_seq_length: int
    seed: int
    device: str
    compute_dtype: str


def verify(
    output: Annotated[Path, typer.Argument(help="The quantized checkpoint's directory.")],
    *,
    source: Annotated[
        str | None, typer.Option(help="What it was made from, a directory or hub id: compares the two.")
    ] = None,
    deep: Annotated[
        bool, typer.Option(help="Run both models over probe tokens, layer by layer; needs --source.")
    ] = False,
    probe: Annotated[
        str | None, typer.Option(help="Text for --deep: as quantize's --calibration [default: the job's probe].")
    ] = None,
    num_probe_samples: Annotated[int, typer.Option(min=1, help="Sequences from --probe.")] = 8,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence from --probe, at most.")] = 512,
    seed: Annotated[int, typer.Option(help="For the choice of sequences from --probe.")] = 0,
    device: Annotated[str, typer.Option(help="For --deep: cpu, cuda or cuda:N; auto takes a GPU if any.")] = "auto",
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="For --deep; auto is float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> VerifyReport:
    """Check a quantized checkpoint: its files, its numbers, and with --source and --deep what the model kept.

    Works on what other tools wrote in NVFP4 or NVFP4A16 as well. A check that fails does not stop the others.
    Raises InputError for what cannot be verified at all: no directory, no quantized checkpoint, a bad source.
    """
    import torch

    from fourge.checks.files import require_quantized

    if deep and source is None:
        raise InputError("--deep compares with the source: name it with --source")
    require_quantized(output)
    arithmetic = resolve_device(device, compute_dtype, threads)
    torch.set_num_threads(arithmetic.pop("threads"))
    options = ProbeOptions(probe, num_probe_samples, max_seq_length, seed, **arithmetic)
    verification = _Verification(output, None if source is None else _open_source(source), options if deep else None)
    verification.run()
    return verification.report()


def _open_source(source: str) -> "Checkpoint":
    from fourge.checkpoint.reader import Checkpoint, require_float, require_unquantized
    from fourge.checkpoint.source import locate

    opened = Checkpoint.open(locate(source))
    require_unquantized(opened)
    require_float(opened)
    return opened


class _Verification:
    """The checks made so far; what a check needs and is not there leaves it out, with the reason."""

    def __init__(self, output: Path, source: "Checkpoint | None", deep: ProbeOptions | None) -> None:
        self.output = output
        self.source = source
        self.deep = deep
        self.checks: dict[str, Check] = {}
        self.deep_result: DeepResult | None = None

    def run(self) -> None:
        from fourge.checks.config import check_config
        from fourge.checks.files import check_digests, check_files, read_job

        manifest, damage = read_job(self.output)
        files, checkpoint = check_files(self.output, manifest, damage)
        self._add([files, check_digests(self.output, manifest)])
        if checkpoint is None:
            return
        config, quantization = check_config(checkpoint.config)
        self._add([config])
        if self.source is not None:
            from fourge.checks.source import check_sidecars, check_source_config

            self._add([check_sidecars(checkpoint, self.source), check_source_config(checkpoint, self.source)])
        if quantization is not None:
            self._look_inside(checkpoint, quantization, manifest)

    def _look_inside(
        self, checkpoint: "Checkpoint", quantization: "Quantization", manifest: "Manifest | None"
    ) -> None:
        """The checks that need to know what should be there."""
        from fourge.checkpoint.architecture import find_architecture
        from fourge.checks.expected import expect
        from fourge.checks.structure import check_tensor_parallel, check_tensors
        from fourge.checks.sweep import Sweep

        expected = expect(checkpoint.directory, find_architecture(checkpoint.config), quantization)
        tensors, sound = check_tensors(checkpoint, expected)
        self._add([tensors, check_tensor_parallel(expected)])
        self._add(Sweep(checkpoint, self.source, expected, sound).run())
        if self.deep is not None and self.source is not None and tensors.status == "passed":
            self.deep_result = _walk(checkpoint, self.source, expected, quantization, manifest, self.deep)
            self._add([self.deep_result.check])

    def _add(self, checks: "Iterable[Check]") -> None:
        self.checks |= {check.name: check for check in checks}

    def report(self) -> VerifyReport:
        checks = tuple(self.checks.get(name) or skipped(name, self._why_skipped(name)) for name in CHECKS)
        result = self.deep_result
        return VerifyReport(
            output=self.output,
            passed=all(check.status != "failed" for check in checks),
            checks=checks,
            fidelity=None if result is None else result.fidelity,
            hidden_errors=[] if result is None else result.hidden_errors,
        )

    def _why_skipped(self, name: str) -> str:
        if name in _NEED_SOURCE and self.source is None:
            return "needs --source"
        if name == "deep" and self.deep is None:
            return "needs --source and --deep"
        cause = next(check.name for check in self.checks.values() if check.status == "failed")
        return f"not possible because of what {cause} says"


def _walk(
    checkpoint: "Checkpoint",
    source: "Checkpoint",
    expected: "Expected",
    quantization: "Quantization",
    manifest: "Manifest | None",
    options: ProbeOptions,
) -> "DeepResult":
    """`--deep`: both lanes over the tokens that `options` name, or those that the job was probed with."""
    import torch

    from fourge.checks.deep import DeepWalk
    from fourge.walk.model import describe_model
    from fourge.walk.streams import lay_out
    from fourge.walk.walk import Walk

    ...
