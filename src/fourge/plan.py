"""`fourge plan`: will it fit, how fast can it be, and what does quantizing it take; from headers or a config alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourge.errors import InputError
from fourge.planning.kv_cache import KvCacheDtype
from fourge.recipe_file import read_recipe_file
from fourge.recipes import DEFAULT as DEFAULT_RECIPE
from fourge.recipes import RecipeName, resolve
from fourge.settings import (
    DEFAULT_IGNORE,
    DEFAULT_TARGETS,
    Backend,
    ComputeDtype,
    KvCacheScheme,
    QuantizeSettings,
    Scheme,
)

if TYPE_CHECKING:
    from fourge.planning.facts import ModelFacts, Part
    from fourge.planning.fit import Fit, Request
    from fourge.planning.hardware import Gpu
    from fourge.planning.kernels import Kernel
    from fourge.planning.kv_cache import KvCache
    from fourge.planning.quantizing import QuantizingCost
    from fourge.planning.tensor_parallel import RankBytes

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's default (`CacheConfig`); it was 0.9 in earlier releases."""
_USUAL_SIZES = (2, 4, 8, 16)


@dataclass(frozen=True)
class ModelSizes:
    """The model by the byte; source sizes are None for a checkpoint that is quantized already.

    Tensor bytes, but for `shard_bytes`: the size of the output's weight files with their headers.
    """

    architecture: str
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    parameters: int
    quantized_parameters: int
    parts: "tuple[Part, ...]"
    source_bytes: int | None
    source_layer_bytes: int | None
    output_bytes: int
    output_layer_bytes: int
    num_shards: int
    shard_bytes: int


@dataclass(frozen=True)
class PlanReport:
    """What `fourge plan` found.

    `scheme` names every one that occurs: `NVFP4`, `NVFP4 + FP8`. `gpus` has every known kind in the smallest number
    that holds the request, `asked` the GPU of `--gpu` or `--gpu-memory` in the number asked for, or the smallest.
    `kernels` describes the kernels that occur in them. `tensor_parallel_ranks` has the weights on a rank by size,
    `tensor_parallel_obstacles` says of the usual sizes what hinders them. `quantizing` is None for a checkpoint
    that is quantized already.
    """

    model: str
    origin: str
    scheme: str
    sizes: ModelSizes
    kv_cache: "KvCache"
    tensor_parallel_sizes: tuple[int, ...]
    tensor_parallel_ranks: "dict[int, RankBytes]"
    tensor_parallel_obstacles: dict[int, str]
    request: "Request"
    gpus: "tuple[Fit, ...]"
    asked: "Fit | None"
    kernels: "tuple[Kernel, ...]"
    quantizing: "QuantizingCost | None"
    notes: tuple[str, ...]

    @property
    def schemes(self) -> list[str]:
        """Every one by itself."""
        return self.scheme.split(" + ")


def plan(
    model: Annotated[str, typer.Argument(help="A checkpoint directory, a config.json, or a hub id.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    scheme: Annotated[Scheme, typer.Option(help="NVFP4 is W4A4; NVFP4A16 quantizes weights only.")] = "NVFP4",
    kv_cache_scheme: Annotated[
        KvCacheScheme | None, typer.Option(help="fp8: with scales for a KV cache of one byte a value.")
    ] = None,
    recipe_file: Annotated[
        Path | None, typer.Option(help="JSON or YAML: scheme, method or BF16 for modules by their names.")
    ] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Modules to quantize [default: Linear].")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Modules to leave [default: lm_head].")] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPU to serve on, and how many: b200:2.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU not known: 96GiB.")] = None,
    sm: Annotated[str | None, typer.Option(help="Its compute capability: 12.0.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="How many GPUs [default: what --gpu says, or the fewest that do].")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence [default: the model's].")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences of that length at once.")] = 1,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of each GPU that the engine may take; vLLM's default.")
    ] = GPU_MEMORY_UTILIZATION,
    kv_cache_dtype: Annotated[
        KvCacheDtype, typer.Option(help="auto is FP8 where the checkpoint says so, else two bytes.")
    ] = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where quantize would write; its disk is measured.")
    ] = Path(),
    recipe: Annotated[
        RecipeName | None, typer.Option(help=f"As for quantize [default: {DEFAULT_RECIPE}, unless --method].")
    ] = None,
    method: Annotated[str | None, typer.Option(help="As for quantize.")] = None,
    smooth: Annotated[bool | None, typer.Option(help="As for quantize.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="As for quantize; counted is only whether it is 'none'.")
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="As for quantize.")] = 512,
    num_validation_samples: Annotated[int | None, typer.Option(min=0, help="As for quantize.")] = None,
    num_probe_samples: Annotated[int, typer.Option(min=0, help="As for quantize.")] = 32,
    max_seq_length: Annotated[int, typer.Option(min=2, help="As for quantize.")] = 2048,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="As for quantize.")] = 2048,
    compute_dtype: Annotated[ComputeDtype, typer.Option(help="As for quantize.")] = "auto",
    device: Annotated[str, typer.Option(help="As for quantize.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="As for quantize.")] = 0,
    backend: Annotated[Backend, typer.Option(help="As for quantize.")] = "auto",
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Measure nothing, so estimate no time.")] = False,
) -> PlanReport:
    """Plan a model: its size in NVFP4, the GPUs that serve it, and what quantizing it on this machine takes.

    Reads headers, or config.json alone; never weights. Unless told not to, runs for ten seconds what quantize
    does, to estimate its time. Raises InputError for a model or GPU that cannot be planned for.
    """
    import torch

    from fourge.planning.fit import Request, fit, smallest_fit
    from fourge.planning.hardware import GPUS, parse_gpu
    from fourge.planning.kv_cache import describe_kv_cache, resolve_kv_cache_dtype
    from fourge.planning.model import describe
    from fourge.planning.quantizing import estimate_quantizing
    from fourge.planning.tensor_parallel import first_obstacle, rank_bytes, working_sizes
    from fourge.walk.choices import Selection
    from fourge.walk.device import resolve_backend, resolve_device
    from fourge.walk.passes import methods_named, validation_samples

    named = parse_gpu(gpu, gpu_memory, sm)
    count = _resolve_count(gpu, named, tensor_parallel_size)
    arithmetic = resolve_device(device, compute_dtype, threads)
    calibration = calibration or ("text" if scheme == "NVFP4" else "none")
    chosen = resolve(recipe, method, smooth, has_data=calibration != "none")
    rules = None if recipe_file is None else read_recipe_file(Path(recipe_file))
    targets, ignore = targets or [*DEFAULT_TARGETS], [*DEFAULT_IGNORE] if ignore is None else ignore
    selection = Selection(tuple(targets), tuple(ignore), scheme, chosen.method, rules or ())
    facts, source = describe(model, revision, selection, kv_cache_scheme)
    length = _resolve_length(facts, max_model_len)
    request = Request(length, concurrency, gpu_memory_utilization, resolve_kv_cache_dtype(facts, kv_cache_dtype))
    asked = None
    if named is not None:
        asked = smallest_fit(facts, named[0], request) if count is None else fit(facts, named[0], count, request)
    gpus = tuple(smallest_fit(facts, known, request) for known in GPUS)
    cost = None
    if source is not None:
        torch.set_num_threads(arithmetic["threads"])
        settings = QuantizeSettings(
            model=model,
            revision=revision,
            scheme=scheme,
            kv_cache_scheme=kv_cache_scheme,
            method=chosen.method,
            smooth=chosen.smooth,
            recipe_file=rules,
            targets=tuple(targets),
            ignore=tuple(ignore),
            calibration=calibration,
            probe=None,
            num_calibration_samples=num_calibration_samples,
            num_validation_samples=validation_samples(
                num_validation_samples, num_calibration_samples, chosen.smooth, methods_named(chosen.method, rules)
            ),
            num_probe_samples=num_probe_samples,
            max_seq_length=max_seq_length,
            seed=0,
            input_headroom=2.0,
            micro_batch_tokens=micro_batch_tokens,
            backend=resolve_backend(backend, arithmetic["device"]),
            **arithmetic,
        )
        cost = estimate_quantizing(facts, source, settings, output, probe=not no_probe)
    sizes = working_sizes(facts)
    obstacles = {size: first_obstacle(facts, size) for size in _USUAL_SIZES}
    return PlanReport(
        model=model,
        origin=facts.origin,
        scheme=facts.mixture,
        sizes=_sizes(facts),
        kv_cache=describe_kv_cache(facts),
        tensor_parallel_sizes=sizes,
        tensor_parallel_ranks={size: rank_bytes(facts, size) for size in sizes},
        tensor_parallel_obstacles={size: why for size, why in obstacles.items() if why is not None},
        request=request,
        gpus=gpus,
        asked=asked,
        kernels=_occurring(gpus if asked is None else (*gpus, asked)),
        quantizing=cost,
        notes=facts.notes,
    )


def _resolve_count(
    gpu: str | None, named: "tuple[Gpu, int | None] | None", tensor_parallel_size: int | None
) -> int | None:
    """The number of GPUs asked for, None where the fewest are to be found."""
    if tensor_parallel_size is None:
        return None if named is None else named[1]
    if named is None:
        raise InputError(f"--tensor-parallel-size {tensor_parallel_size}: of which GPU? name it with --gpu")
    if named[1] not in (None, tensor_parallel_size):
        raise InputError(f"--gpu {gpu} and --tensor-parallel-size {tensor_parallel_size} disagree; leave one out")
    return tensor_parallel_size


def _resolve_length(facts: "ModelFacts", max_model_len: int | None) -> int:
    most = facts.max_position_embeddings
    if max_model_len is not None and max_model_len > most:
        raise InputError(f"--max-model-len {max_model_len}: the model's max_position_embeddings is {most}; lower it")
    return max_model_len or most


def _sizes(facts: "ModelFacts") -> ModelSizes:
    from fourge.planning.facts import largest_layer_bytes, list_parts, total_bytes

    return ModelSizes(
        architecture=facts.architecture.name,
        num_layers=facts.num_layers,
        num_attention_heads=facts.num_attention_heads,
        num_key_value_heads=facts.num_key_value_heads,
        parameters=facts.parameters,
        quantized_parameters=facts.quantized_parameters,
        parts=list_parts(facts),
        source_bytes=None if facts.source is None else total_bytes(facts.source),
        source_layer_bytes=None if facts.source is None else largest_layer_bytes(facts, facts.source),
        output_bytes=total_bytes(facts.output),
        output_layer_bytes=largest_layer_bytes(facts, facts.output),
        num_shards=facts.num_shards,
        shard_bytes=facts.shard_bytes,
    )


def _occurring(fits: "tuple[Fit, ...]") -> "tuple[Kernel, ...]":
    from fourge.planning.kernels import KERNELS

    names = {fit.kernel for fit in fits}
    return tuple(kernel for kernel in KERNELS if kernel.name in names)
