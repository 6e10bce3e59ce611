"""`fourge quantize`: a BF16 checkpoint becomes an NVFP4 one, one decoder layer at a time, safe to kill."""

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourge.progress import mute, peak_resident_bytes
from fourge.recipe_file import read_recipe_file
from fourge.recipes import DEFAULT as DEFAULT_RECIPE
from fourge.recipes import RecipeName, resolve
from fourge.settings import (
    DEFAULT_CALIBRATION,
    DEFAULT_IGNORE,
    DEFAULT_TARGETS,
    Backend,
    ComputeDtype,
    KvCacheScheme,
    QuantizeSettings,
    Scheme,
)

if TYPE_CHECKING:
    from fourge.walk.job import Job
    from fourge.walk.run import QuantizeRun


@dataclass(frozen=True)
class QuantizeResult:
    """What a finished run reports. `fidelity` is None where nothing was probed; byte counts are exact."""

    output: Path
    fidelity: dict[str, Any] | None
    source_bytes: int
    output_bytes: int
    quantized_linears: int
    linears_by_scheme: dict[str, int]
    events: int
    seconds: float
    peak_resident_bytes: int
    continued: bool
    device: str
    backend: str


def quantize(
    model: Annotated[str, typer.Argument(help="A local checkpoint directory, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write; also the job's.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    scheme: Annotated[Scheme, typer.Option(help="NVFP4 is W4A4; NVFP4A16 quantizes weights only.")] = "NVFP4",
    kv_cache_scheme: Annotated[
        KvCacheScheme | None, typer.Option(help="fp8: calibrate scales for a KV cache of one byte a value.")
    ] = None,
    recipe: Annotated[
        RecipeName | None, typer.Option(help=f"How much care to take [default: {DEFAULT_RECIPE}, unless --method].")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="max, search, gptq, replay or tuned: how weights and scales are chosen.")
    ] = None,
    smooth: Annotated[
        bool | None,
        typer.Option(help="Fold powers of two into norms, up_proj and v_proj where validation text gains by it."),
    ] = None,
    recipe_file: Annotated[
        Path | None, typer.Option(help="JSON or YAML: scheme, method or BF16 for modules by their names.")
    ] = None,
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
    num_validation_samples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Sequences that decide what is kept [default: an eighth of the calibration's, at least 8, with "
            "--smooth or --method tuned; else 0].",
        ),
    ] = None,
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
    backend: Annotated[
        Backend, typer.Option(help="Whose NVFP4 loops compute, same bytes; auto takes fused ones where installed.")
    ] = "auto",
    restart: Annotated[bool, typer.Option(help="Throw away what an earlier run left in the output.")] = False,
) -> QuantizeResult:
    """Quantize a BF16 checkpoint to NVFP4. The same command continues a run that was stopped.

    Reads the source layer by layer, writes one shard a layer, and ends with how far the quantized model is from
    the source on held-out tokens. Under torchrun its ranks share the work, and the bytes are those of one process.
    Raises InputError for what the caller can mend; what was committed stays.
    """
    import torch

    from fourge.checkpoint.durable import disk_errors_named
    from fourge.walk.device import resolve_backend, resolve_device
    from fourge.walk.passes import methods_named, validation_samples
    from fourge.walk.ranks import join_ranks
    from fourge.walk.resources import return_freed_layers
    from fourge.walk.run import QuantizeRun

    began = time.monotonic()
    arithmetic = resolve_device(device, compute_dtype, threads)
    output = Path(output)  # a script may well give a string
    calibration = calibration or (DEFAULT_CALIBRATION if scheme == "NVFP4" else "none")
    chosen = resolve(recipe, method, smooth, has_data=calibration != "none")
    rules = None if recipe_file is None else read_recipe_file(Path(recipe_file))
    settings = QuantizeSettings(
        model=model,
        revision=revision,
        scheme=scheme,
        kv_cache_scheme=kv_cache_scheme,
        method=chosen.method,
        smooth=chosen.smooth,
        recipe_file=rules,
        targets=tuple(targets or DEFAULT_TARGETS),
        ignore=tuple(DEFAULT_IGNORE if ignore is None else ignore),
        calibration=calibration,
        probe=probe,
        num_calibration_samples=num_calibration_samples,
        num_validation_samples=validation_samples(
            num_validation_samples, num_calibration_samples, chosen.smooth, methods_named(chosen.method, rules)
        ),
        num_probe_samples=num_probe_samples,
        max_seq_length=max_seq_length,
        seed=seed,
        input_headroom=input_headroom,
        micro_batch_tokens=micro_batch_tokens,
        backend=resolve_backend(backend, arithmetic["device"]),
        **arithmetic,
    )
    torch.set_num_threads(settings.threads)
    return_freed_layers()
    ranks = join_ranks(settings.device)
    if not ranks.first:
        mute()
    with ExitStack() as held:
        with ranks.as_one():
            run = QuantizeRun.prepare(settings, output, ranks)
        alike = run.fingerprint() | {"threads": settings.threads, "backend": settings.backend}
        ranks.require_same(alike, "all ranks need the same")
        with ranks.as_one():
            job = held.enter_context(run.open_job(restart)) if ranks.first else None
            held.enter_context(disk_errors_named(output))
        run.work(job)
        return ranks.from_first(None if job is None else _result(run, job, time.monotonic() - began))


def _result(run: "QuantizeRun", job: "Job", seconds: float) -> QuantizeResult:
    return QuantizeResult(
        output=run.output,
        fidelity=job.result["fidelity"] if job.result else None,
        source_bytes=sum(info.nbytes for info in run.source.tensors.values()),
        output_bytes=sum(record.size for record in job.records),
        quantized_linears=len(run.layout.quantized),
        linears_by_scheme=dict(Counter(run.layout.schemes.values())),
        events=sum(len(record.events) for record in job.records),
        seconds=seconds,
        peak_resident_bytes=peak_resident_bytes(),
        continued=job.continued,
        device=run.settings.device,
        backend=run.settings.backend,
    )
