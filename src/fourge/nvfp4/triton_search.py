"""The exact search for group scales on a GPU, fused: see `methods/scale_search.py`, whose bits these are (Triton).

A thread has a group to itself, in two halves of eight values: so Triton spreads no group over threads, which would then
exchange sums, and work out every step twice.
"""

import triton
import triton.language as tl

from fourge.nvfp4.triton_rounding import (
    FIRST_NORMAL,
    LARGEST,
    SIX,
    SMALLEST,
    divisor_of,
    e2m1_value,
    e4m3_value,
    eighth_of,
    index,
    largest_bits,
    magnitudes,
    max_scale,
    number,
    shifted,
    step_of,
    sum_pairs,
)


@triton.jit
def _squares(even, odd, h):
    """Σ h x² over a half, `[groups, 4]` twice to `[groups]`."""
    even_h, odd_h = h
    return sum_pairs(even * even * even_h + odd * odd * odd_h)


@triton.jit
def _half_error(half, h, step, eighth, divisor, fp32: tl.constexpr):
    even, odd = half
    moved_even, moved_odd = shifted(even, odd, divisor)
    even_miss = e2m1_value(index(moved_even, eighth, fp32), 0) * step - even
    odd_miss = e2m1_value(index(moved_odd, eighth, fp32), 0) * step - odd
    return _squares(even_miss, odd_miss, h)


@triton.jit
def _error(left, right, left_h, right_h, step, divisor, fp32: tl.constexpr):
    """Σ h (ŵ − w)² of each group of magnitudes. Signs do not matter."""
    step = step[:, None]
    eighth = eighth_of(step, divisor)
    left_error = _half_error(left, left_h, step, eighth, divisor, fp32)
    return left_error + _half_error(right, right_h, step, eighth, divisor, fp32)


@triton.jit
def _half_clipping(half, h, step):
    even, odd = half
    most = step[:, None] * SIX
    return _squares(tl.maximum(even - most, 0.0), tl.maximum(odd - most, 0.0), h)


@triton.jit
def _half(words_ptr, group, there, start: tl.constexpr):
    """The magnitudes in four words of each group, and the largest of them."""
    places = group[:, None] * 8 + (start + tl.arange(0, 4))[None, :]
    words = tl.load(words_ptr + places, mask=there[:, None], other=0)
    even, odd = magnitudes(words)
    return (number(even), number(odd)), largest_bits(words)


@triton.jit
def _half_h(h_ptr, group, there, start: tl.constexpr):
    places = group[:, None] * 16 + 2 * (start + tl.arange(0, 4))[None, :]
    there = there[:, None]
    return tl.load(h_ptr + places, mask=there, other=0.0), tl.load(h_ptr + places + 1, mask=there, other=0.0)


@triton.jit
def search(
    words_ptr,
    global_ptr,
    h_ptr,
    offsets_ptr,
    scales_ptr,
    count,
    groups_a_row,
    trials,
    lowest,
    block: tl.constexpr,
):
    """The best scales of words, FP32.

    `h` FP32 `[K]`; `offsets` int32 `[trials]`, what to try around the start, in order, the max scale itself before
    them; `lowest` is the least of them. A program's groups go down together until none of them may gain.
    """
    first = tl.program_id(0).to(tl.int64) * block
    group = tl.arange(0, block)
    there = group < tl.minimum(count - first, block).to(tl.int32)
    left, left_largest = _half(words_ptr + first * 8, group, there, 0)
    right, right_largest = _half(words_ptr + first * 8, group, there, 4)
    column = (first + group) % groups_a_row
    left_h, right_h = _half_h(h_ptr, column, there, 0), _half_h(h_ptr, column, there, 4)
    fp32: tl.constexpr = words_ptr.dtype.element_ty == tl.int64
    divisor = divisor_of(global_ptr, not fp32)

    scale, best = max_scale(number(tl.maximum(left_largest, right_largest)), divisor)
    start = tl.maximum(best, FIRST_NORMAL)
    least = _error(left, right, left_h, right_h, step_of(scale, divisor), divisor, fp32)
    for trial in range(trials):
        code = tl.minimum(tl.maximum(start + tl.load(offsets_ptr + trial), SMALLEST), LARGEST)
        error = _error(left, right, left_h, right_h, step_of(e4m3_value(code), divisor), divisor, fp32)
        best = tl.where(error < least, code, best)
        least = tl.minimum(error, least)

    code = start + lowest
    alive = there
    going = 1
    while going > 0:
        code -= 1
        step = step_of(e4m3_value(tl.maximum(code, SMALLEST)), divisor)
        clipping = _half_clipping(left, left_h, step) + _half_clipping(right, right_h, step)
        alive = alive & (code >= SMALLEST) & (clipping < least)
        error = _error(left, right, left_h, right_h, step, divisor, fp32)
        better = alive & (error < least)
        best = tl.where(better, code, best)
        least = tl.where(better, error, least)
        going = tl.max(alive.to(tl.int32), axis=0)
    tl.store(scales_ptr + first + group, e4m3_value(best), mask=there)
