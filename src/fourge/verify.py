"""`fourge verify`: whether a quantized checkpoint can be trusted, one check after the other."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourge.checks.probe import DeepOptions, Probe, choose_probe
from fourge.checks.report import Check, skipped
from fourge.errors import InputError
from fourge.settings import ComputeDtype

if TYPE_CHECKING:
    from fourge.checkpoint.reader import Checkpoint
    from fourge.checks.config import Quantization
    from fourge.checks.deep import DeepResult
    from fourge.walk.job import Manifest

CHECKS = (
    *("files", "digests", "provenance", "config", "tensors", "tensor_parallel", "scales", "fused_groups"),
    *("sidecars", "source_config", "unquantized", "dequantized", "deep"),
)
"""The names of all checks, in the order of the report. A last one, "signature", is made where a key is named."""
_NEED_SOURCE = ("sidecars", "source_config", "unquantized", "dequantized")
_DEEP_NEEDS = ("tensors", "scales", "fused_groups")


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
        str | None, typer.Option(help="Text for --deep: as quantize's --calibration; the job's own probe if left out.")
    ] = None,
    num_probe_samples: Annotated[int, typer.Option(min=1, help="Sequences from --probe.")] = 8,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence from --probe, at most.")] = 512,
    seed: Annotated[int, typer.Option(help="For the choice of sequences from --probe.")] = 0,
    signature: Annotated[
        bool, typer.Option("--signature", help="Check the OpenSSF signature, too; either of the next two says whose.")
    ] = False,
    public_key: Annotated[
        Path | None, typer.Option(help="For --signature, which it implies: the signer's public key, PEM.")
    ] = None,
    certificate_chain: Annotated[
        list[Path] | None, typer.Option(help="Likewise: certificates that are trusted, PEM; may be repeated.")
    ] = None,
    signature_file: Annotated[Path | None, typer.Option(help="Where it is [default: OUT/model.sig].")] = None,
    device: Annotated[str, typer.Option(help="For --deep: cpu, cuda or cuda:N; auto takes a GPU if any.")] = "auto",
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="For --deep; auto is float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> VerifyReport:
    """Check a quantized checkpoint: its files, its numbers, and with --source and --deep what the model kept.

    Works on what other tools wrote in NVFP4, NVFP4A16 or a mixture with FP8 as well. A check that fails does not stop
    the others. Raises InputError for what cannot be verified at all: no directory, no quantized checkpoint, a bad
    source.
    """
    import torch

    from fourge.checks.files import require_quantized
    from fourge.checks.signature import check_signature
    from fourge.walk.device import resolve_device

    output = Path(output)  # a script may well give a string
    if deep and source is None:
        raise InputError("--deep compares with the source: name it with --source")
    if (signature or signature_file is not None) and public_key is None and not certificate_chain:
        raise InputError("--signature: whose? Name the signer's --public-key, or --certificate-chain")
    if public_key is not None and certificate_chain:
        raise InputError("--public-key and --certificate-chain: name one of them, as it was signed")
    require_quantized(output)
    signed = None
    if public_key is not None or certificate_chain:
        signed = check_signature(output, signature_file, public_key, certificate_chain or [])
    arithmetic = resolve_device(device, compute_dtype, threads)
    torch.set_num_threads(arithmetic.pop("threads"))
    options = DeepOptions(probe, num_probe_samples, max_seq_length, seed, **arithmetic) if deep else None
    verification = _Verification(output, None if source is None else _open_source(source), options)
    verification.run()
    verification.add([] if signed is None else [signed])
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

    def __init__(self, output: Path, source: "Checkpoint | None", options: DeepOptions | None) -> None:
        self.output = output
        self.source = source
        self.options = options
        self.checks: dict[str, Check] = {}
        self.deep: DeepResult | None = None

    def run(self) -> None:
        from fourge.checks.config import check_config
        from fourge.checks.files import check_digests, check_files, read_job
        from fourge.checks.provenance import check_provenance

        manifest, damage = read_job(self.output)
        probe = None
        if self.options is not None and self.source is not None:
            # Before the long checks: what is wrong with the tokens is for the user to mend.
            probe = choose_probe(self.output, self.source, manifest, self.options)
        files, checkpoint = check_files(self.output, manifest, damage)
        self.add([files, check_digests(self.output, manifest)])
        if checkpoint is None:
            return
        self.add([check_provenance(checkpoint, manifest, self.source)])
        config, quantization = check_config(checkpoint.config)
        self.add([config])
        if self.source is not None:
            from fourge.checks.source import check_sidecars, check_source_config

            self.add([check_sidecars(checkpoint, self.source), check_source_config(checkpoint, self.source)])
        if quantization is not None:
            self._look_inside(checkpoint, quantization, manifest, probe)

    def _look_inside(
        self,
        checkpoint: "Checkpoint",
        quantization: "Quantization",
        manifest: "Manifest | None",
        probe: Probe | None,
    ) -> None:
        """The checks that need to know what should be there."""
        from fourge.checkpoint.architecture import find_architecture
        from fourge.checks.deep import walk_deep
        from fourge.checks.expected import expect
        from fourge.checks.folded import FoldedSource, recorded_scalings
        from fourge.checks.source import most_moved
        from fourge.checks.structure import check_tensor_parallel, check_tensors
        from fourge.checks.sweep import Sweep

        expected = expect(checkpoint.directory, find_architecture(checkpoint.config), quantization)
        tensors, sound = check_tensors(checkpoint, expected)
        self.add([tensors, check_tensor_parallel(expected)])
        scalings, damage = recorded_scalings(manifest, self.output, expected)
        folded = None if self.source is None else FoldedSource.of(self.source, scalings)
        moved = most_moved(manifest, self.output, expected)
        self.add(Sweep(checkpoint, folded, expected, sound, damage, moved).run())
        walkable = all(self.checks[name].status == "passed" for name in _DEEP_NEEDS)
        if self.source is not None and self.options is not None and probe is not None and walkable:
            self.deep = walk_deep(checkpoint, self.source, expected, probe, self.options)
            self.add([self.deep.check])

    def add(self, checks: Iterable[Check]) -> None:
        self.checks |= {check.name: check for check in checks}

    def report(self) -> VerifyReport:
        names = (*CHECKS, *(name for name in self.checks if name not in CHECKS))
        checks = tuple(self.checks.get(name) or skipped(name, self._why_skipped(name)) for name in names)
        return VerifyReport(
            output=self.output,
            passed=all(check.status != "failed" for check in checks),
            checks=checks,
            fidelity=None if self.deep is None else self.deep.fidelity,
            hidden_errors=[] if self.deep is None else self.deep.hidden_errors,
        )

    def _why_skipped(self, name: str) -> str:
        if name in _NEED_SOURCE and self.source is None:
            return "needs --source"
        if name == "deep" and self.options is None:
            return "needs --source and --deep"
        failed = ", ".join(check.name for check in self.checks.values() if check.status == "failed")
        return f"not possible before these pass: {failed}"
