"""What a token costs in the KV cache: a key and a value per layer and KV head."""

from dataclasses import dataclass
from typing import Literal

from fourge.planning.facts import ModelFacts

KvCacheDtype = Literal["auto", "bfloat16", "fp8"]
"""vLLM's names; `auto` is FP8 for a checkpoint that says so (`kv_cache_scheme`), else the model's own, two bytes."""

BLOCK_TOKENS = 16
"""vLLM hands the cache out in blocks of this many tokens."""

_BYTES = {"auto": 2, "bfloat16": 2, "fp8": 1}


@dataclass(frozen=True)
class KvCache:
    """Bytes a token, over all layers, for the model as a whole."""

    bytes_per_token_bf16: int
    bytes_per_token_fp8: int


def resolve_kv_cache_dtype(facts: ModelFacts, dtype: KvCacheDtype) -> KvCacheDtype:
    """FP8 for `auto` where the checkpoint has scales for it, as vLLM takes it; any other choice stands."""
    return "fp8" if dtype == "auto" and facts.kv_cache_scheme is not None else dtype


def describe_kv_cache(facts: ModelFacts) -> KvCache:
    """Bytes a token in both dtypes, on one GPU."""
    return KvCache(bytes_per_token(facts, "bfloat16", 1), bytes_per_token(facts, "fp8", 1))


def bytes_per_token(facts: ModelFacts, dtype: KvCacheDtype, tensor_parallel_size: int) -> int:
    """Bytes a token takes on each rank; where ranks outnumber KV heads, each still holds a whole one.

    `dtype` is a resolved one, where `auto` stands for two bytes.
    """
    heads = max(1, facts.num_key_value_heads // tensor_parallel_size)
    return 2 * facts.num_layers * heads * facts.head_dim * _BYTES[dtype]
