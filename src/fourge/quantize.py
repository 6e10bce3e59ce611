"""`fourge quantize`: a BF16 checkpoint becomes an NVFP4 one, one decoder layer at a time, safe to kill."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourge._version import __version__
from fourge.errors import InputError
from fourge.settings import FREE_ON_CONTINUATION, ComputeDtype, QuantizeSettings, Scheme

if TYPE_CHECKING:
    import torch

    from fourge.checkpoint.layout import Layout
    from fourge.checkpoint.reader import Checkpoint
    from fourge.data.tokens import TokenSets
    from fourge.walk.job import Job
    from fourge.walk.skeleton import Skeleton
    from fourge.walk.streams import Stream

DEFAULT_CALIBRATION = "HuggingFaceH4/ultrachat_200k"


@dataclass(frozen=True)
class QuantizeResult:
    """What a finished run reports. `fidelity` is None where nothing was probed; byte counts are exact."""

    output: Path
    fidelity: dict[str, Any] | None
    source_bytes: int
    output_bytes: int
    quantized_linears: int
    events: int
    seconds: float
    peak_resident_bytes: int
    continued: bool


def quantize(
    model: Annotated[str, typer.Argument(help="A local checkpoint directory, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write; also the job's.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    scheme: Annotated[Scheme, typer.Option(help="NVFP4 is W4A4; NVFP4A16 quantizes weights only.")] = "NVFP4",
    method: Annotated[str, typer.Option(help="How weights and scales are chosen.")] = "max",
    targets: Annotated[list[str] | None, typer.Option(help="Modules to quantize [default: Linear].")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Modules to leave [default: lm_head].")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A hub dataset, a local file, 'self', 'random', or 'none' (weight-only, no probe) "
            f"[default: {DEFAULT_CALIBRATION}; none for NVFP4A16]."
        ),
    ] = None,
    probe: Annotated[str | None, typer.Option(help="Held-out text, if not from the calibration's source.")] = None,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")] = 512,
    num_probe_samples: Annotated[int, typer.Option(min=0, help="Held-out sequences, only reported.")] = 32,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence, at most.")] = 2048,
    seed: Annotated[int, typer.Option(help="For the choice of samples, and for sampling.")] = 0,
    input_headroom: Annotated[
        float, typer.Option(min=1.0, help="Range of the inputs over the calibrated one; the card's recipe is 1.")
    ] = 2.0,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens run through a layer at once.")] = 2048,
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="Arithmetic of the walk; auto is float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
    restart: Annotated[bool, typer.Option(help="Throw away what an earlier run left in the output.")] = False,
) -> QuantizeResult:
    """Quantize a BF16 checkpoint to NVFP4. The same command continues a run that was stopped.

    Reads the source layer by layer, writes one shard a layer, and ends with how far the quantized model is from
    the source on held-out tokens. Raises InputError for what the caller can mend; what was committed stays.
    """
    import torch

    from fourge.checkpoint.durable import disk_errors_named
    from fourge.walk.device import resolve_device
    from fourge.walk.resources import return_freed_layers

    began = time.monotonic()
    settings = QuantizeSettings(
        model=model,
        revision=revision,
        scheme=scheme,
        method=method,
        targets=tuple(targets or ["Linear"]),
        ignore=tuple(["lm_head"] if ignore is None else ignore),
        calibration=calibration or (DEFAULT_CALIBRATION if scheme == "NVFP4" else "none"),
        probe=probe,
        num_calibration_samples=num_calibration_samples,
        num_probe_samples=num_probe_samples,
        max_seq_length=max_seq_length,
        seed=seed,
        input_headroom=input_headroom,
        micro_batch_tokens=micro_batch_tokens,
        **resolve_device(device, compute_dtype, threads),
    )
    torch.set_num_threads(settings.threads)
    return_freed_layers()
    run = _Run.prepare(settings, output)
    with run.open_job(restart) as job, disk_errors_named(output):
        _quantize_in(job, run)
    fidelity = job.result["fidelity"] if job.result else None
    return QuantizeResult(
        output=output,
        fidelity=fidelity,
        source_bytes=sum(info.nbytes for info in run.source.tensors.values()),
        output_bytes=sum(record.size for record in job.records),
        quantized_linears=len(run.layout.quantized),
        events=sum(len(record.events) for record in job.records),
        seconds=time.monotonic() - began,
        peak_resident_bytes=peak_resident_bytes(),
        continued=job.continued,
    )


def peak_resident_bytes() -> int:
    """The largest resident memory this process ever had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class _Run:
    """A validated request: everything that can be known from headers is known, and nothing is written yet."""

    settings: QuantizeSettings
    output: Path
    source: "Checkpoint"
    skeleton: "Skeleton"
    layout: "Layout"
    device: "torch.device"
    dtype: "torch.dtype"

    @classmethod
    def prepare(cls, settings: QuantizeSettings, output: Path) -> "_Run":
        import torch

        from fourge.checkpoint.reader import Checkpoint, require_float, require_unquantized
        from fourge.checkpoint.source import locate
        from fourge.methods import find_method
        from fourge.walk.model import describe_model

        method = find_method(settings.method)
        if settings.calibration == "none" and method.needs_hessian:
            raise InputError(
                f"--calibration none: --method {settings.method} needs data; name some, or --method search"
            )
        if settings.scheme == "NVFP4" and settings.calibration == "none":
            raise InputError(
                "--calibration none: NVFP4 needs data for its input scales; name some, or --scheme NVFP4A16"
            )
        source = Checkpoint.open(locate(settings.model, settings.revision))
        require_unquantized(source)
        require_float(source)
        device = torch.device(settings.device)
        skeleton, layout = describe_model(source, settings.targets, settings.ignore, device)
        if output.resolve() == source.directory.resolve():
            raise InputError(f"-o {output} is the source itself; name a new directory")
        return cls(settings, output, source, skeleton, layout, device, getattr(torch, settings.compute_dtype))

    @property
    def needs_calibration(self) -> bool:
        """Weight-only `max` looks at no activation, so there the calibration set would run for nothing."""
        from fourge.methods import find_method

        method = find_method(self.settings.method)
        return self.settings.scheme == "NVFP4" or method.weighs_channels or method.needs_hessian

    def fingerprint(self) -> dict[str, Any]:
        import torch
        import transformers

        return {
            **self.settings.fingerprint(),
            "source": self.source.digest(),
            "fourge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @contextmanager
    def open_job(self, restart: bool) -> "Iterator[Job]":
        from fourge.walk.job import Job

        written = 0 if restart else sum(path.stat().st_size for path in self.output.glob("model-*.safetensors"))
        self._require_room(0, 0, written)
        with Job(self.output, self.fingerprint(), self.settings.to_json()).open(restart=restart) as job:
            try:
                yield job
            except BaseException:
                if job.next_step == 0 and not job.tokens_path.exists():
                    job.discard()
                else:
                    job.remove_leftovers()
                raise

    def token_sets(self, job: "Job") -> "TokenSets | None":
        """The job's sequences: rendered once, then read back, so that a continued run sees the same tokens."""
        settings = self.settings
        if settings.calibration == "none":
            return None
        from fourge.data import DataRequest, load_token_sets, read_token_sets, save_token_sets
        from fourge.progress import announced
        from fourge.walk.resident import make_sampler

        if not job.tokens_path.exists():
            request = DataRequest(
                source=settings.calibration,
                num_calibration_samples=settings.num_calibration_samples,
                num_probe_samples=settings.num_probe_samples,
                max_seq_length=settings.max_seq_length,
                seed=settings.seed,
                probe_source=settings.probe,
            )
            sampler = make_sampler(self.source, self.skeleton, self.dtype, self.device)
            vocabulary = int(self.skeleton.config.vocab_size)
            with announced(f"Rendering {settings.calibration}"):
                sets = load_token_sets(request, self.source.directory, vocabulary, sampler)
            save_token_sets(job.tokens_path, sets)
        return read_token_sets(job.tokens_path)

    def streams(self, sets: "TokenSets | None") -> "tuple[Stream, ...]":
        from fourge.methods import find_method
        from fourge.walk.streams import lay_out

        if sets is None:
            return ()
        calibration = sets.calibration.sequences if self.needs_calibration else ()
        propagated = calibration if find_method(self.settings.method).needs_hessian else ()
        probe = sets.probe.sequences
        return lay_out(
            [
                ("calibration", "bf16", calibration),
                ("calibration", "nvfp4", propagated),
                ("probe", "bf16", probe),
                ("probe", "nvfp4", probe),
            ],
            self.settings.micro_batch_tokens,
        )

    def require_room(self, streams: "tuple[Stream, ...]", already_written: int) -> None:
        rows = streams[-1].last_row if streams else 0
        batches = [batch.count * batch.length for stream in streams for batch in stream.batches]
        self._require_room(rows, max(batches, default=0), already_written)

    def _require_room(self, rows: int, longest_batch: int, already_written: int) -> None:
        from fourge.walk.hidden import HiddenLayout
        from fourge.walk.resources import estimate_needs, require_resources

        hidden = HiddenLayout(rows, self.skeleton.hidden_size, self.dtype)
        needs = estimate_needs(self.layout, self.source, self.settings.scheme, hidden, longest_batch)
        require_resources(needs, self.output, self.device, already_written)


def _quantize_in(job: "Job", run: _Run) -> None:
    """Runs the steps that are left and finishes the directory; a finished one is left as it is."""
    from fourge.methods import find_method
    from fourge.progress import WalkProgress, announced
    from fourge.walk.finish import finish_checkpoint
    from fourge.walk.model import require_finite_ends
    from fourge.walk.steps import QuantizingWalk
    from fourge.walk.walk import Walk

    job.remove_leftovers()
    if job.finished:
        print(f"{run.output} is finished already; --restart would do it again", file=sys.stderr)
        return
    if not job.continued:
        with announced("Checking embedding and head for NaN and Inf"):
            require_finite_ends(run.source, run.layout)
    sets = run.token_sets(job)
    streams = run.streams(sets)
    walk = Walk(run.skeleton, run.source, streams, run.dtype, run.device)
    quantizing = QuantizingWalk(walk, run.layout, run.settings, find_method(run.settings.method))
    if job.continued:
        with announced(f"Checking {job.next_step} committed steps of {run.output}"):
            job.check_committed(walk.hidden_layout if streams else None, lambda count: None)
    run.require_room(streams, sum(record.size for record in job.records))
    steps, costs = run.layout.num_steps, quantizing.costs()
    with WalkProgress("quantize", steps, job.next_step, job.metrics_path, costs=costs) as progress:
        quantizing.run(job, progress)
    finish_checkpoint(job, run.source, run.layout, run.settings.scheme, sets.provenance if sets else None)


__all__ = ["FREE_ON_CONTINUATION", "QuantizeResult", "quantize"]
