"""On what a model will be served, and whether it fits there: GPUs that are named or found, or else the CPU."""

import math
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fourge.checkpoint.exchange import COMPRESSED_TENSORS, MODELOPT, describe_content, find_layout
from fourge.checkpoint.folder import CONFIG, regular_file
from fourge.checkpoint.header import parse_object
from fourge.checkpoint.modelopt import HF_QUANT_CONFIG, read_hf_quant_config
from fourge.checkpoint.reader import Checkpoint
from fourge.errors import InputError
from fourge.planning.facts import ModelFacts
from fourge.planning.fit import Fit, Request, fit, smallest_fit
from fourge.planning.hardware import GIB, GPUS, MIB, Gpu
from fourge.planning.kernels import KERNELS, MARLIN_WITHOUT_BF16, Kernel
from fourge.planning.kv_cache import bytes_per_token
from fourge.planning.model import describe
from fourge.planning.tensor_parallel import working_sizes
from fourge.progress import format_binary
from fourge.walk.choices import Selection
from fourge.walk.job import FOLDER, INDEX
from fourge.walk.resources import available_memory

_CPU_WORKING_BYTES = 2 * GIB
"""vLLM's two processes with torch imported, and a batch's tensors."""

_QUERY = "name,memory.total,compute_cap,index,uuid"


@dataclass(frozen=True)
class Placement:
    """`numerics` says what the Linears compute there. `kv_cache_gib` is the cache to set aside on a CPU, None else."""

    hardware: str
    on_cpu: bool
    tensor_parallel_size: int
    kernel: str
    numerics: str
    dtype: str
    kv_cache_gib: int | None


# The checkpoint


def read_facts(output: Path) -> ModelFacts:
    """The facts of a finished quantized checkpoint, in either layout; InputError for anything else."""
    if not output.is_dir():
        raise InputError(f"{output}: no such directory; give the one that `fourge quantize` wrote")
    if (output / FOLDER).is_dir() and not (output / INDEX).exists():
        raise InputError(f"{output}: the job is not finished; run the same `fourge quantize` command again")
    checkpoint = Checkpoint.open(output)
    if find_layout(checkpoint) is not MODELOPT:
        return describe(str(output), None, Selection())[0]
    return _modelopt_facts(checkpoint)


def _modelopt_facts(checkpoint: Checkpoint) -> ModelFacts:
    """As its twin in compressed-tensors' layout has them: tensor for tensor, the bytes are the same."""
    path = regular_file(checkpoint.directory, HF_QUANT_CONFIG)
    scheme, kv_cache_scheme, exclude = read_hf_quant_config(path, parse_object(path.read_bytes(), str(path)))
    content = describe_content(checkpoint, MODELOPT, scheme, kv_cache_scheme, exclude)
    with tempfile.TemporaryDirectory(prefix="fourge-serve-") as folder:
        twin = Path(folder) / CONFIG
        twin.write_bytes(content.documents_in(COMPRESSED_TENSORS)[CONFIG])
        facts = describe(str(twin), None, Selection())[0]
    return replace(facts, name=str(checkpoint.directory))


# GPUs


def find_gpus(environment: Mapping[str, str]) -> tuple[Gpu, int] | None:
    """The kind of GPU in this machine and how many a server would see; None where there is none.

    As the NVIDIA driver's `nvidia-smi` lists them, less those that CUDA_VISIBLE_DEVICES hides. AMD's are not looked
    for: name them. Raises InputError for different kinds in one machine, and for one whose memory is not told.
    """
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # no driver, or one without a device: a machine with no GPU
    rows = [[field.strip() for field in line.split(",")] for line in listed.splitlines() if line.strip()]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [device.strip() for device in visible.split(",")]
        rows = [row for row in rows if any(w == row[3] or (w and row[4].startswith(w)) for w in wanted)]
    if not rows:
        return None
    if len({row[0] for row in rows}) > 1:
        names = ", ".join(sorted({row[0] for row in rows}))
        raise InputError(f"this machine has different GPUs ({names}); choose alike ones with CUDA_VISIBLE_DEVICES")
    return _parse_gpu_row(rows[0]), len(rows)


def _parse_gpu_row(row: list[str]) -> Gpu:
    name, memory, capability = row[:3]
    known = max((gpu.name for gpu in GPUS if gpu.name in name), key=len, default=name)
    major, _, minor = capability.partition(".")
    if not (memory.isdecimal() and major.isdecimal() and minor.isdecimal()):
        raise InputError(f"{name}: the driver does not tell its memory; give it by --gpu-memory 96GiB --sm 12.1")
    return Gpu(known, int(memory) * MIB, 10 * int(major) + int(minor))


def place_on_gpus(
    facts: ModelFacts, gpu: Gpu, count: int | None, most: int | None, request: Request, linear_backend: str | None
) -> Placement:
    """On `count` GPUs, or on the fewest of at most `most` that hold the request.

    Raises InputError with the plan's reason where they do not hold it.
    """
    if linear_backend is not None:
        gpu = replace(gpu, sm=None)  # what a GPU without a kernel of its own gets
    found = _choose_fit(facts, gpu, count, most, request)
    if not found.holds:
        raise InputError(f"{facts.name} cannot be served on {found.count} × {found.gpu}: {found.reason}")
    kernel = next(kernel for kernel in KERNELS if kernel.name == found.kernel)
    return Placement(
        hardware=f"{found.count} × {found.gpu}",
        on_cpu=False,
        tensor_parallel_size=found.count,
        kernel=kernel.name,
        numerics=_numerics(facts, kernel),
        dtype="half" if kernel == MARLIN_WITHOUT_BF16 else "auto",
        kv_cache_gib=None,
    )


def _choose_fit(facts: ModelFacts, gpu: Gpu, count: int | None, most: int | None, request: Request) -> Fit:
    if count is not None:
        return fit(facts, gpu, count, request)
    if most is None:
        return smallest_fit(facts, gpu, request)
    sizes = [size for size in working_sizes(facts) if size <= most]
    fits = [fit(facts, gpu, size, request) for size in sizes or [1]]
    return next((found for found in fits if found.holds), fits[-1])


def _numerics(facts: ModelFacts, kernel: Kernel) -> str:
    return "W4A4" if kernel.activations_quantized and facts.scheme == "NVFP4" else "W4A16"


# The CPU


def place_on_cpu(facts: ModelFacts, request: Request, quantizes_activations: bool) -> Placement:
    """On this machine's CPU, where the plugin holds the weights in BF16; InputError where memory will not do."""
    if "FP8" in facts.schemes.values():
        raise InputError(
            f"{facts.name} has Linears in FP8, and on a CPU vLLM runs none but those in NVFP4: name GPUs with --gpu"
        )
    token = bytes_per_token(facts, request.kv_cache_dtype, 1)
    cache = math.ceil(request.concurrency * request.max_model_len * token / GIB) * GIB
    weights = 2 * facts.parameters
    need, have = weights + cache + _CPU_WORKING_BYTES, available_memory()
    if have < need:
        raise InputError(
            f"{facts.name} does not fit this machine's memory (no GPU is here): {format_binary(weights)} of weights, "
            f"which a CPU holds in BF16, {cache / GIB:.0f} GiB of KV cache for {request.concurrency} × "
            f"{request.max_model_len:,} tokens, 2 GiB to work in; {format_binary(have)} are free: "
            "lower --max-model-len, or name GPUs with --gpu"
        )
    return Placement(
        hardware="the CPU",
        on_cpu=True,
        tensor_parallel_size=1,
        kernel="our plugin",
        numerics="W4A4" if quantizes_activations else "W4A16",
        dtype="auto",
        kv_cache_gib=cache // GIB,
    )


def resolve_length(facts: ModelFacts, max_model_len: int | None) -> int:
    """Tokens a sequence, the model's own limit where nothing is asked; InputError above it."""
    most = facts.max_position_embeddings
    if max_model_len is not None and max_model_len > most:
        raise InputError(f"--max-model-len {max_model_len}: the model's max_position_embeddings is {most}; lower it")
    return max_model_len or most
