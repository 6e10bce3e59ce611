"""Upper bounds on speed: what memory bandwidth and arithmetic allow, with nothing lost to anything else.

Real engines reach a part of it: kernels miss their peak, ranks talk to each other, and attention, sampling and
scheduling take time of their own. No number from here is a prediction.
"""

from dataclasses import dataclass

from fourge.planning.facts import ModelFacts
from fourge.planning.hardware import Gpu
from fourge.planning.kernels import EMULATION, FP4, Kernel
from fourge.planning.kv_cache import KvCacheDtype, bytes_per_token
from fourge.planning.tensor_parallel import rank_bytes


@dataclass(frozen=True)
class Roofline:
    """Tokens/s, upper bounds, over all sequences.

    `decode_alone`: one sequence with an empty cache. `decode`: as many sequences as asked, each at full length.
    `prefill`: a prompt of full length. `decode_bound_by` names what limits `decode`.
    """

    decode_alone: float
    decode: float
    prefill: float
    decode_bound_by: str


def bound_speed(
    facts: ModelFacts, gpu: Gpu, kernel: Kernel, size: int, max_model_len: int, concurrency: int, dtype: KvCacheDtype
) -> Roofline | None:
    """The bounds on `size` GPUs; None where the GPU's rates are not known."""
    if gpu.bandwidth is None or gpu.bf16 is None:
        return None
    work = _Work(facts, gpu, kernel, size, dtype, gpu.bandwidth, gpu.bf16)
    memory = work.memory_seconds(concurrency, max_model_len)
    arithmetic = concurrency * work.token_seconds(max_model_len)
    prompt = max(max_model_len * work.token_seconds(max_model_len / 2, with_head=False), work.memory_seconds(0, 0))
    return Roofline(
        decode_alone=1 / max(work.memory_seconds(1, 0), work.token_seconds(0)),
        decode=concurrency / max(memory, arithmetic),
        prefill=max_model_len / prompt,
        decode_bound_by="memory bandwidth" if memory >= arithmetic else "arithmetic",
    )


@dataclass(frozen=True)
class _Work:
    """Seconds that one rank takes for pieces of work at its peak rates."""

    facts: ModelFacts
    gpu: Gpu
    kernel: Kernel
    size: int
    dtype: KvCacheDtype
    bandwidth: float
    bf16: float

    def memory_seconds(self, sequences: int, context: int) -> float:
        """One step: every weight read once, and the cache of each sequence."""
        facts = self.facts
        read = rank_bytes(facts, self.size).weights
        embedding = f"{facts.architecture.embedding}.weight"
        if not facts.tied_head:  # a handful of its rows is looked up; a tied one is read as the head
            read -= facts.output[embedding].nbytes // self.size
        if self.kernel == EMULATION:  # written as BF16, and read back
            read += 2 * 2 * (facts.quantized_parameters - facts.fp8_parameters) // self.size
        cache = sequences * context * bytes_per_token(facts, self.dtype, self.size)
        return (read + cache) / self.bandwidth

    def token_seconds(self, context: float, with_head: bool = True) -> float:
        """The arithmetic of one token that sees `context` others: two operations a weight, four a cached value."""
        facts = self.facts
        fp4 = self.gpu.fp4 if self.kernel == FP4 else None
        linears = (facts.quantized_parameters - facts.fp8_parameters) / (fp4 or self.bf16)
        linears += facts.fp8_parameters / (self.gpu.fp8 or self.bf16)
        linears += (facts.linear_parameters - facts.quantized_parameters) / self.bf16
        if with_head:
            linears += facts.head_parameters / self.bf16
        attention_rate = self.gpu.fp8 if self.dtype == "fp8" and self.gpu.fp8 else self.bf16
        values = facts.num_layers * facts.num_attention_heads * facts.head_dim * context
        return (2 * linears + 4 * values / attention_rate) / self.size
