"""Whether a number of GPUs holds the model and its KV cache, and the smallest number that does."""

from collections.abc import Iterable
from dataclasses import dataclass

from fourge.planning.facts import ModelFacts
from fourge.planning.hardware import GIB, Gpu
from fourge.planning.kernels import EMULATION, FP4, KERNELS, Kernel, choose_kernel
from fourge.planning.kv_cache import BLOCK_TOKENS, KvCacheDtype, bytes_per_token
from fourge.planning.roofline import Roofline, bound_speed
from fourge.planning.tensor_parallel import first_obstacle, padded_vocabulary, rank_bytes, working_sizes
from fourge.progress import format_binary

_FIXED_OVERHEAD = 5 * GIB // 2
"""What the driver keeps for itself, CUDA context, NCCL buffers, CUDA graphs: of the size that start-up logs show."""

_LARGE_MEMORY = 70 * GIB

_WEIGHT_ONLY = tuple(kernel.name for kernel in KERNELS if not kernel.activations_quantized)


@dataclass(frozen=True)
class Request:
    """What is asked of the server; `concurrency` sequences of `max_model_len` tokens at once."""

    max_model_len: int
    concurrency: int
    gpu_memory_utilization: float
    kv_cache_dtype: KvCacheDtype


@dataclass(frozen=True)
class Fit:
    """`count` GPUs of one kind under a request; bytes are per GPU.

    `budget` is the share that the engine may take. `overhead`, what it needs beside weights and cache, is an
    estimate, as is what follows from it; `weights` is exact, and `replicated` of it lies on other ranks too.
    `kv_cache_tokens` and `full_length_sequences` are in the dtype of the request, `kv_cache_tokens_fp8` whatever
    that is. Where `holds` is False, `reason` says why, and the bytes are 0 if there is no kernel or the model cannot
    be cut so.
    """

    gpu: str
    count: int
    kernel: str | None
    holds: bool
    reason: str | None
    memory: int
    budget: int
    weights: int = 0
    replicated: int = 0
    overhead: int = 0
    kv_cache: int = 0
    kv_cache_tokens: int = 0
    kv_cache_tokens_fp8: int = 0
    full_length_sequences: int = 0
    roofline: Roofline | None = None


def smallest_fit(facts: ModelFacts, gpu: Gpu, request: Request) -> Fit:
    """The fit of the fewest GPUs that hold the request; the largest tensor-parallel size's where none does."""
    sizes = working_sizes(facts) if choose_kernel(gpu, facts.scheme) else ()
    fits = (fit(facts, gpu, size, request) for size in sizes)
    return next((found for found in fits if found.holds), None) or fit(facts, gpu, max(sizes, default=1), request)


def smallest_of(fits: Iterable[Fit], *, native: bool) -> Fit | None:
    """The fewest GPUs among those fits that hold the model, and of as many the kind with the least memory.

    `native` takes those that multiply in FP4; otherwise those that hold the weights in FP4 and multiply in 16 bits.
    """
    found = [one for one in fits if one.holds and (one.kernel == FP4.name if native else one.kernel in _WEIGHT_ONLY)]
    return min(found, key=lambda one: (one.count, one.memory), default=None)


def fit(facts: ModelFacts, gpu: Gpu, count: int, request: Request) -> Fit:
    """How the model lies on `count` GPUs under tensor parallelism."""
    kernel = choose_kernel(gpu, facts.scheme)
    budget = int(gpu.memory * request.gpu_memory_utilization)
    obstacle = first_obstacle(facts, count)
    if kernel is None:
        return Fit(gpu.name, count, None, False, _no_kernel(gpu), gpu.memory, budget)
    if obstacle is not None:
        why = f"tensor-parallel size {count} does not work: {obstacle}"
        return Fit(gpu.name, count, kernel.name, False, why, gpu.memory, budget)
    held = rank_bytes(facts, count)
    overhead = estimate_overhead(facts, gpu, kernel, count)
    cache = max(0, budget - held.weights - overhead)
    tokens = _tokens_held(cache, facts, request.kv_cache_dtype, count)
    sequences = tokens // request.max_model_len
    reason = _shortage(request, budget, held.weights, overhead, tokens) if sequences < request.concurrency else None
    length, at_once, dtype = request.max_model_len, request.concurrency, request.kv_cache_dtype
    return Fit(
        gpu=gpu.name,
        count=count,
        kernel=kernel.name,
        holds=reason is None,
        reason=reason,
        memory=gpu.memory,
        budget=budget,
        weights=held.weights,
        replicated=held.replicated,
        overhead=overhead,
        kv_cache=cache,
        kv_cache_tokens=tokens,
        kv_cache_tokens_fp8=_tokens_held(cache, facts, "fp8", count),
        full_length_sequences=sequences,
        roofline=None if reason else bound_speed(facts, gpu, kernel, count, length, at_once, dtype),
    )


def _tokens_held(cache: int, facts: ModelFacts, dtype: KvCacheDtype, count: int) -> int:
    """Tokens in `cache` bytes of each rank, in whole blocks."""
    return cache // (BLOCK_TOKENS * bytes_per_token(facts, dtype, count)) * BLOCK_TOKENS


def estimate_overhead(facts: ModelFacts, gpu: Gpu, kernel: Kernel, size: int) -> int:
    """Bytes a rank needs beside weights and cache: a fixed part, and the tensors of the largest batch.

    The batch is vLLM's own choice for a server: 8192 tokens and 1024 sequences on GPUs of 70 GiB and more except
    the A100, else 2048 and 256.
    """
    large = gpu.memory >= _LARGE_MEMORY and gpu.name != "A100"
    tokens, sequences = (8192, 1024) if large else (2048, 256)
    residual = 3 * facts.hidden_size
    gate_up_and_product = 3 * facts.intermediate_size // size
    logits = 2 * 4 * sequences * padded_vocabulary(facts)
    overhead = _FIXED_OVERHEAD + 2 * tokens * (residual + gate_up_and_product) + logits
    if kernel == EMULATION:  # gate and up, widened to BF16
        overhead += 2 * 2 * facts.intermediate_size * facts.hidden_size // size
    return overhead


def _no_kernel(gpu: Gpu) -> str:
    return f"no NVFP4 kernel runs on SM{gpu.sm}: Marlin begins at SM75, FP4 tensor cores at SM100"


def _shortage(request: Request, budget: int, weights: int, overhead: int, tokens: int) -> str:
    if tokens < BLOCK_TOKENS:
        return (
            f"weights of {format_binary(weights)} and about {format_binary(overhead)} to work in exceed the "
            f"{format_binary(budget)} that the engine may take of each GPU"
        )
    return (
        f"the KV cache holds {tokens:,} tokens, {request.concurrency} × {request.max_model_len:,} are asked for; "
        "lower --max-model-len or --concurrency, or take --kv-cache-dtype fp8"
    )
