"""The largest magnitude in a CPU tensor, by its bits: floats order as their bits do, Inf after all numbers, NaN last.

In numpy and one thread: as fast as torch's `aminmax` in one, and without its team of OpenMP threads, which between
fused loops that run in threads of their own costs more than it saves.
"""

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 17
"""Values whose masked bits stay in the cache."""

_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


def infinity_bits(dtype: torch.dtype) -> int:
    """What `largest_bits` is at least where a tensor of `dtype` (BF16, FP16 or FP32) holds Inf or NaN."""
    return _INFINITY[dtype]


def largest_bits(x: Tensor) -> int:
    """The bits, without the sign, of the largest magnitude in contiguous `x` of such a dtype; NaN is the largest."""
    flat = x.detach().view(-1)
    bits = flat.view(torch.uint16 if x.dtype.itemsize == 2 else torch.uint32).numpy()
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    masked = np.empty(min(_CHUNK, len(bits)), bits.dtype)
    largest = 0
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        largest = max(largest, int(np.bitwise_and(chunk, magnitude, out=masked[: len(chunk)]).max()))
    return largest


def from_bits(bits: int, dtype: torch.dtype) -> Tensor:
    """The number, `[]`, that `largest_bits` gave the bits of."""
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    return torch.tensor(bits, dtype=kind).view(dtype)
