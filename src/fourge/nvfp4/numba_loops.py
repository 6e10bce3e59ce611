"""The fused loops on CPU tensors: hands their memory to numba's kernels, rows split over torch's number of threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourge.nvfp4 import numba_kernels as kernels
from fourge.nvfp4 import numba_replay
from fourge.nvfp4.magnitude import from_bits, largest_bits
from fourge.nvfp4.quantize import GROUP_SIZE

_FEWEST_VALUES = 1 << 18
"""A helper is called for no fewer."""

_WIDENED_ROWS = 256  # of FP16, which no kernel reads

_PARTS_PER_THREAD = 4  # one that is held up leaves the rest to the others


def amax(x: Tensor) -> Tensor:
    """See `FusedLoops`; a loop of numba's would be slower."""
    return from_bits(largest_bits(x), x.dtype).float()


def encode(weight: Tensor, global_scale: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `FusedLoops`."""
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    codes = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.uint8)
    given = np.empty((0, 0), np.float32) if scales is None else _array(scales.float())
    arguments = _array(weight), _number(global_scale), given, packed.numpy(), codes.numpy(), GROUP_SIZE
    _by_rows(kernels.encode, rows, columns, *arguments)
    return packed, codes.view(torch.float8_e4m3fn)


def decode(packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `FusedLoops`."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    result = torch.empty(rows, columns, dtype=dtype)
    arguments = _array(packed), _codes(scale), _number(global_scale), _array(result), GROUP_SIZE
    _by_rows(kernels.decode, rows, columns, *arguments)
    return result


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """See `FusedLoops`."""
    x = x.contiguous()
    result = torch.empty_like(x)
    _by_rows(kernels.fake_quantize, *x.shape, _array(x), _number(global_scale), _array(result), GROUP_SIZE)
    return result


def squared_errors(weight: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `FusedLoops`."""
    errors, norms = (torch.empty(scale.shape, dtype=torch.float32) for _ in range(2))
    arguments = _array(weight), _array(packed), _codes(scale), _number(global_scale), errors.numpy(), norms.numpy()
    _by_rows(kernels.squared_errors, *weight.shape, *arguments, GROUP_SIZE)
    return errors, norms


def search(weight: Tensor, global_scale: Tensor, h: Tensor, offsets: list[int]) -> Tensor:
    """See `FusedLoops`."""
    groups = weight.shape[1] // GROUP_SIZE
    scales = torch.empty(weight.shape[0], groups)
    lanes = kernels.LANES
    padded = torch.zeros(-(-groups // lanes) * lanes, GROUP_SIZE)
    padded[:groups] = h.view(groups, GROUP_SIZE)
    h_by_lane = padded.view(-1, lanes, GROUP_SIZE)[..., kernels.PLACES].transpose(1, 2).reshape(-1, 2, 8 * lanes)
    arguments = h_by_lane.numpy(), np.array(offsets, np.int32)
    step = _WIDENED_ROWS if weight.dtype == torch.float16 else max(1, len(weight))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block = weight[rows].float() if weight.dtype == torch.float16 else weight
        found = scales[rows].numpy()
        _by_rows(kernels.search, *block.shape, _array(block), _number(global_scale), *arguments, found, lanes)
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
    inputs = _array(weight), fed.numpy(), _array(feedback), _array(cost), _array(scales), _number(global_scale)
    arguments = *inputs, window, alternating, codes.numpy(), chosen.numpy()
    _by_rows(numba_replay.replay_group, weight.shape[1], GROUP_SIZE * (2 * window + 2), *arguments)


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor, BF16 as uint16; copied only where it is not contiguous."""
    x = x.detach().contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _codes(scale: Tensor) -> np.ndarray[Any, Any]:
    return _array(scale.contiguous().view(torch.uint8))


def _number(x: Tensor) -> np.float32:
    return np.float32(x.item())


def _by_rows(kernel: Callable[..., None], rows: int, columns: int, *arguments: Any) -> None:
    """Runs a kernel over all rows, a part at a time, in this thread and as many helpers as there is work for."""
    threads = min(torch.get_num_threads(), rows, rows * columns // _FEWEST_VALUES)
    if threads < 2:
        kernel(*arguments, 0, rows)
        return
    bounds = np.linspace(0, rows, _PARTS_PER_THREAD * threads + 1, dtype=int).tolist()
    left = iter(list(pairwise(bounds)))

    def work() -> None:
        for first, last in left:  # shared: the GIL hands every part to one of them
            kernel(*arguments, first, last)

    helpers = [_helpers().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun by now is not waited for
            helper.result()


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads that wait for work: to start some for every call takes longer than most calls."""
    return ThreadPoolExecutor(os.cpu_count(), "fused loops")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a forked process has no threads but the one that forked
