"""Triton's interpreter where it does not compute what a GPU does: `fma` rounds twice, FP32 to BF16 not at all."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BELOW_TIES = 0x0FFFFFFF
"""FP64's bits below the one that decides a tie of FP32's."""


def correct() -> None:
    """Makes it round as a GPU does."""
    InterpreterBuilder.create_fma = _create_fma
    InterpreterBuilder.create_fp_trunc = _create_fp_trunc


def fused_multiply_add(x: Any, y: Any, z: Any) -> Any:
    """x · y + z of FP32 arrays of one shape, rounded once.

    In FP64 the product is exact and the sum is not; that shows in FP32 only where the sum looks like a tie and is
    none. What was cut off then goes into its last bit.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product, addend = x.astype(np.float64) * y, z.astype(np.float64)
        total = product + addend
        bits = total.view(np.int64)
        ties = np.isfinite(total) & (bits & _BELOW_TIES == 0)
        moved = total[ties] - product[ties]
        cut_off = (product[ties] - (total[ties] - moved)) + (addend[ties] - moved)
        bits[ties] += np.sign(cut_off * total[ties]).astype(np.int64)
        return total.astype(np.float32)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    assert z.data.dtype == np.float32
    return TensorHandle(fused_multiply_add(x.data, y.data, z.data), z.dtype.scalar)


def _create_fp_trunc(self: Any, x: Any, dtype: Any) -> Any:
    if dtype.scalar != tl.bfloat16:
        return self.cast_impl(x, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16)
    return TensorHandle(rounded.numpy(), tl.bfloat16)
