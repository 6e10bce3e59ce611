"""How engines cut a model over the ranks of a tensor-parallel group, and what each rank then holds.

Column-parallel Linears (q, k, v, gate, up) are cut by output rows, row-parallel ones (o, down) by input columns,
embedding and head by vocabulary, padded to 64. Norms, global scales, and of row-parallel Linears the biases and what
FP8 has for scales, are on every rank, and so are key and value heads where there are fewer than ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fourge.checkpoint.compressed_tensors import COLUMNS_PER_RANK_MULTIPLE
from fourge.planning.facts import ModelFacts, Stored

LARGEST_SIZE = 64
VOCABULARY_PADDING = 64

_ROW_PARALLEL = ("o_proj", "down_proj")
_PER_KV_HEAD = ("k_proj", "v_proj")
_GLOBAL = ("weight_global_scale", "input_global_scale")


@dataclass(frozen=True)
class RankBytes:
    """Bytes of weights on one rank, and how many of them the other ranks hold as well."""

    weights: int
    replicated: int


def padded_vocabulary(facts: ModelFacts) -> int:
    """Rows of embedding and head as the engine allocates them."""
    return -(-facts.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING


def working_sizes(facts: ModelFacts) -> tuple[int, ...]:
    """The tensor-parallel sizes up to 64 over which the model can be cut."""
    return tuple(size for size in range(1, LARGEST_SIZE + 1) if first_obstacle(facts, size) is None)


def first_obstacle(facts: ModelFacts, size: int) -> str | None:
    """What keeps the model from being cut over `size` ranks, None if nothing does."""
    return next(_obstacles(facts, size), None)


def _obstacles(facts: ModelFacts, size: int) -> Iterator[str]:
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    if heads % size:
        yield f"{heads} attention heads do not divide by {size}"
    if kv_heads % size and size % kv_heads:
        yield f"{kv_heads} key-value heads neither divide by {size} nor divide it"
    if padded_vocabulary(facts) % size:
        yield f"a vocabulary of {padded_vocabulary(facts)} does not divide by {size}"
    for linear in facts.layer_linears():
        rows, columns = facts.shapes[f"{linear}.weight"]
        by_columns = linear.endswith(_ROW_PARALLEL)
        cut, what = (columns, "columns") if by_columns else (rows, "rows")
        if cut % size and not linear.endswith(_PER_KV_HEAD):
            yield f"{linear} has {cut} {what}, which do not divide by {size}"
            continue
        per_rank = columns // size if by_columns else columns
        if facts.schemes.get(linear, "FP8") != "FP8" and per_rank % COLUMNS_PER_RANK_MULTIPLE:
            yield f"{linear} has {per_rank} columns a rank, FP4 kernels take them in {COLUMNS_PER_RANK_MULTIPLE}s"


def rank_bytes(facts: ModelFacts, size: int) -> RankBytes:
    """The weights of one rank of `size`, which must be a working size, exactly as the file stores them."""
    weights = replicated = 0
    for name, tensor in facts.output.items():
        parts = _ways_cut(facts, name, size)
        held = tensor.nbytes // parts
        if name.removesuffix(".weight") in (facts.architecture.embedding, facts.architecture.head):
            held = _padded_share(facts, tensor, size)
        weights += held
        if parts < size:
            replicated += held
    return RankBytes(weights, replicated)


def _ways_cut(facts: ModelFacts, name: str, size: int) -> int:
    """Into how many different pieces an output tensor is cut."""
    owner, _, kind = name.rpartition(".")
    if owner in (facts.architecture.embedding, facts.architecture.head):
        return size
    linear = owner.removeprefix(f"{facts.architecture.layers}.").partition(".")[2]
    if linear not in facts.architecture.linears or kind in _GLOBAL:
        return 1
    if linear.endswith(_PER_KV_HEAD):
        return min(size, facts.num_key_value_heads)
    by_row = kind == "bias" or (kind == "weight_scale" and facts.schemes.get(owner) == "FP8")
    return 1 if by_row and linear.endswith(_ROW_PARALLEL) else size


def _padded_share(facts: ModelFacts, tensor: Stored, size: int) -> int:
    return tensor.nbytes // facts.vocab_size * (padded_vocabulary(facts) // size)
