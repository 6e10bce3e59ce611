"""How many tokens go through a layer at once, and whether memory and disk will do: known before anything is done."""

import shutil
from pathlib import Path

import torch

from fourge.checkpoint.durable import nearest_existing
from fourge.errors import InputError
from fourge.evaluation.lanes import ScoringLane
from fourge.evaluation.packing import Packing, RowCost
from fourge.progress import format_bytes
from fourge.walk.resources import available_memory

MOST_TOKENS = 4096
"""More at once gains nothing: the weights' widening is long paid for, and a row's attention grows as its square."""

_FEWEST_TOKENS = 256
_OVERHEAD_TOKENS = 64.0
"""What a row costs beside its tokens (weights widened anew, Python), in tokens; the order of magnitude matters."""

_MASK_BYTES = 8
"""A pair of tokens in a row that branches: the boolean mask, what it is made from, and its FP32 form."""

_WORKING_BYTES = 200 << 20
_SHARE_OF_MEMORY = 0.5
"""Of what is free beside a layer; the rest is for the page cache, which holds the hidden states."""


def row_cost(lane: ScoringLane) -> RowCost:
    """What a row costs beside a layer's Linears: those take 2 · parameters FLOP a token, attention 4 · heads ·
    head_dim a pair of tokens, masked or not."""
    linears = _linear_shapes(lane)
    query = f"{lane.layout.architecture.attention}.q_proj"
    parameters = sum(rows * columns for rows, columns in linears.values())
    return RowCost(_OVERHEAD_TOKENS, parameters / (2 * linears[query][0]))


def must_walk_alone(lane: ScoringLane) -> bool:
    """Whether a row's longest position changes the rotary table of all of it, so that sequences cannot share one."""
    rope = getattr(lane.config, "rope_parameters", None) or {}
    return bool(rope.get("rope_type") == "longrope")


def choose_micro_batch(lanes: tuple[ScoringLane, ...]) -> int:
    """Tokens a row that half of the memory beside a layer holds: a power of two from 256 to 4096."""
    free = _memory_of_one(lanes[0]) - _layer_memory(lanes)
    tokens = MOST_TOKENS
    while tokens > _FEWEST_TOKENS and _row_bytes(lanes[0], tokens, branches=True) > _SHARE_OF_MEMORY * free:
        tokens //= 2
    return tokens


def head_chunk_rows(lanes: tuple[ScoringLane, ...]) -> int:
    """Rows whose final hidden states are held at once at the head: as many as take a layer's memory, which is free
    then, and 8192 at least. The head is read once a chunk; the number follows from the models alone."""
    walk = lanes[0].walk
    row_bytes = len(lanes) * walk.skeleton.hidden_size * walk.dtype.itemsize
    return max(8192, max(lane.layer_bytes for lane in lanes) // row_bytes)


def require_room(
    lanes: tuple[ScoringLane, ...], packing: Packing, hidden_bytes: int, folder: Path, fresh: bool
) -> None:
    """InputError, naming what is needed and what there is, where disk or memory will not do.

    `hidden_bytes` is the size of one step's hidden states; a walk begun afresh has two on disk at its largest, one
    continued writes one beside that which is there.
    """
    need, free = (2 if fresh else 1) * hidden_bytes, shutil.disk_usage(nearest_existing(folder)).free
    if free < need:
        raise InputError(
            f"{folder}: {format_bytes(need)} of disk are needed for hidden states, {format_bytes(free)} are free; "
            "free some, name another -o, or ask less at once (--limit, fewer --tasks)"
        )
    memory = _layer_memory(lanes) + max(
        _row_bytes(lanes[0], row.num_tokens, branches=not row.is_chain) for row in packing.rows
    )
    have = _memory_of_one(lanes[0])
    if have < memory:
        raise InputError(
            f"{format_bytes(memory)} of memory are needed for one layer and the longest row, {format_bytes(have)} are "
            "there; free some, or lower --micro-batch-tokens and --max-length"
        )


def _linear_shapes(lane: ScoringLane) -> dict[str, tuple[int, ...]]:
    """The shapes `[N, K]` of a layer's Linears by name relative to it."""
    prefix = lane.layout.architecture.layer_prefix(0)
    return {name: lane.layout.shapes[f"{prefix}{name}.weight"] for name in lane.layout.architecture.linears}


def _row_bytes(lane: ScoringLane, tokens: int, *, branches: bool) -> int:
    # Residual, normed input, its quantized copy and two outputs of the hidden width; gate, up and their product.
    widest = max(rows for rows, _ in _linear_shapes(lane).values())
    values = tokens * (6 * lane.walk.skeleton.hidden_size + 4 * widest)
    return values * lane.walk.dtype.itemsize + (_MASK_BYTES * tokens**2 if branches else 0)


def _layer_memory(lanes: tuple[ScoringLane, ...]) -> int:
    return max(lane.layer_bytes for lane in lanes) + _WORKING_BYTES


def _memory_of_one(lane: ScoringLane) -> int:
    """What may be taken by this process: on CPUs, its ranks share the machine's."""
    free = free_memory(lane.walk.device)
    return free if lane.walk.device.type == "cuda" else free // lane.walk.ranks.local_size


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken where the walk computes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
