"""The fused loops on CUDA tensors, launched: see `triton_kernels.py`. In Triton's interpreter, on CPU tensors too."""

from typing import Any

import torch
import triton
from torch import Tensor

from fourge.nvfp4 import triton_interpreter, triton_replay, triton_search
from fourge.nvfp4 import triton_kernels as kernels
from fourge.nvfp4.quantize import GROUP_SIZE

_INTERPRETED = triton.knobs.runtime.interpret
if _INTERPRETED:
    triton_interpreter.correct()

_GROUPS = 512 if _INTERPRETED else 128
"""Groups that a program takes at once; the interpreter takes its time for every program, whatever its size."""

_ROUNDS = 16
"""How often, at most, where there is much to compute for a group: a tenth faster than as many programs."""

_PROGRAMS = 1 if _INTERPRETED else 2048
"""So many keep a GPU busy to the end; with fewer, a program has fewer rounds."""

_SEARCHED_GROUPS = 2048 if _INTERPRETED else 32
"""Fewer in a search, one warp: they wait for the last of them."""

_REPLAYED_ROWS = 64 if _INTERPRETED else 32

_WARP = 32


def amax(x: Tensor) -> Tensor:
    """See `FusedLoops`."""
    count = x.numel() // GROUP_SIZE
    partial = torch.empty(triton.cdiv(count, _GROUPS), dtype=torch.int32, device=x.device)
    _launch(kernels.largest, count, _GROUPS, _words(x), partial)
    return partial.max().view(torch.float32)


def encode(weight: Tensor, global_scale: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `FusedLoops`."""
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    codes = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.uint8, device=weight.device)
    divisor = _scalar(global_scale, weight)
    chosen = divisor if scales is None else _aligned(scales.float())
    arguments = _words(weight), divisor, chosen, packed, codes
    count = codes.numel()
    _launch(kernels.encode, count, _GROUPS, *arguments, rounds=_rounds(count), given=scales is not None)
    return packed, codes.view(torch.float8_e4m3fn)


def decode(packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `FusedLoops`."""
    result = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype, device=packed.device)
    arguments = _aligned(packed), _codes(scale), _scalar(global_scale, packed), result
    _launch(kernels.decode, scale.numel(), _GROUPS, *arguments)
    return result


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """See `FusedLoops`."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    count, arguments = x.numel() // GROUP_SIZE, (_words(x), _scalar(global_scale, x), result)
    _launch(kernels.fake_quantize, count, _GROUPS, *arguments, rounds=_rounds(count))
    return result


def squared_errors(weight: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `FusedLoops`."""
    errors, norms = (torch.empty(scale.shape, dtype=torch.float32, device=weight.device) for _ in range(2))
    arguments = _words(weight), _aligned(packed), _codes(scale), _scalar(global_scale, weight), errors, norms
    _launch(kernels.squared_errors, scale.numel(), _GROUPS, *arguments)
    return errors, norms


def search(weight: Tensor, global_scale: Tensor, h: Tensor, offsets: list[int]) -> Tensor:
    """See `FusedLoops`."""
    weight = weight if weight.dtype == torch.bfloat16 else weight.float()
    rows, groups = weight.shape[0], weight.shape[1] // GROUP_SIZE
    scales = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    tried = torch.tensor(offsets, dtype=torch.int32, device=weight.device)
    arguments = _words(weight), _scalar(global_scale, weight), _aligned(h), tried, scales
    _launch(
        triton_search.search,
        rows * groups,
        _SEARCHED_GROUPS,
        *arguments,
        groups_a_row=groups,
        trials=len(offsets),
        lowest=min(offsets),
    )
    return scales


def replay_group(
    weight: Tensor,
    fed: Tensor,
    feedback: Tensor,
    cost: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    window: int,
    alternating: int,
    codes: Tensor,
    chosen: Tensor,
) -> None:
    """See `FusedLoops`."""
    assert all(x.is_contiguous() for x in (weight, fed, cost, scales, codes, chosen)) and feedback.stride(1) == 1
    arguments = weight, fed, feedback, cost, scales, _scalar(global_scale, weight), codes, chosen
    sizes = {"stride": feedback.stride(0), "window": window, "alternating": alternating}
    _launch(triton_replay.replay_group, weight.shape[1], _REPLAYED_ROWS, *arguments, **sizes)


def _rounds(count: int) -> int:
    """How many blocks of `_GROUPS` a program takes of so many groups."""
    return min(_ROUNDS, max(1, count // (_GROUPS * _PROGRAMS)))


def _launch(
    kernel: Any, count: int, block: int, *arguments: Tensor, rounds: int | None = None, **named: int | bool
) -> None:
    """Runs a kernel over `count` groups (or rows) where its arguments lie: a thread for each of a block.

    A program takes `block` of them, or `rounds` times as many, one block after the other.
    """
    if not count:
        return
    named |= {"count": count, "block": block, "num_warps": max(1, block // _WARP)} | kernels.OPTIONS
    named |= {} if rounds is None else {"rounds": rounds}
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[(triton.cdiv(count, block * (rounds or 1)),)](*arguments, **named)


def _words(x: Tensor) -> Tensor:
    """The memory of BF16 or FP32 `x` in words of two values."""
    return _aligned(x).view(torch.int32 if x.dtype == torch.bfloat16 else torch.int64)


def _codes(scale: Tensor) -> Tensor:
    return _aligned(scale.contiguous().view(torch.uint8))


def _scalar(x: Tensor, beside: Tensor) -> Tensor:
    """FP32 `[]` or `[1]` as it is handed to a kernel: by its place, so that nobody waits for its value."""
    return x.detach().to(beside.device, torch.float32).reshape(1)


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied only where it is not contiguous or does not begin at a multiple of 16 bytes."""
    x = x.detach().contiguous()
    return x.clone() if x.data_ptr() % 16 else x
