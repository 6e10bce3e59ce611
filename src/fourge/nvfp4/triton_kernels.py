"""NVFP4's loops for a GPU, fused: every value is read once, and what lies between stays in registers (Triton).

What the tensor code in `quantize.py` computes, to the bit. A row is a whole number of groups, so groups know nothing of
rows: a program takes a `block` of them that lie one after the other, or `rounds` times as many. Values come and go in
words, two a word: BF16 as int32, FP32 as int64. So a word is a packed byte, and nothing has to be moved between
threads.

What could change bits is not left to the compiler: divisions are IEEE's, conversions to E4M3 are integer arithmetic,
sums of 16 go by pairs, and `OPTIONS` forbid the contraction of a product and a sum.
"""

import triton
import triton.language as tl

from fourge.nvfp4.triton_rounding import (
    FIRST_NORMAL,
    INFINITY,
    divisor_of,
    e2m1_value,
    e4m3,
    e4m3_value,
    eighth_of,
    index,
    largest_bits,
    max_scale,
    nibble_signs,
    number,
    split,
    step_of,
    sum_pairs,
    unpaired,
)

OPTIONS = {"enable_fp_fusion": False}
"""For every launch: a product and a sum are rounded one after the other, as in torch, but where a kernel says `fma`."""


@triton.jit
def _groups(first, count, block: tl.constexpr):
    """`block` groups from `first`: their places, which of them there are, and their words' places `[block, 8]`."""
    group = tl.arange(0, block)
    there = group < tl.minimum(count - first, block).to(tl.int32)
    return group, there, group[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _first(rounds, block: tl.constexpr):
    """This program's first group."""
    return tl.program_id(0).to(tl.int64) * (rounds * block)


@triton.jit
def _store(result_ptr, group, there, even, odd):
    """FP32 values of the even and of the odd columns, in the dtype and the order of the result."""
    groups: tl.constexpr = even.shape[0]
    values = tl.reshape(tl.join(even, odd), (groups, 16)).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + group[:, None] * 16 + tl.arange(0, 16)[None, :], values, mask=there[:, None])


@triton.jit
def _rounded(words, step, divisor):
    """`index` of the even and of the odd columns, and their sign bits in words."""
    eighth = eighth_of(step, divisor)
    even, odd, signs = split(words, step, divisor)
    fp32: tl.constexpr = words.dtype == tl.int64
    return index(even, eighth, fp32), index(odd, eighth, fp32), signs


@triton.jit
def largest(words_ptr, partial_ptr, count, block: tl.constexpr):
    """The largest magnitude that each program saw, as bits, int32 `[programs]`."""
    first = _first(1, block)
    _, there, places = _groups(first, count, block)
    words = tl.load(words_ptr + first * 8 + places, mask=there[:, None], other=0)
    tl.store(partial_ptr + tl.program_id(0), tl.max(largest_bits(words), axis=0))


@triton.jit
def encode(
    words_ptr,
    global_ptr,
    scales_ptr,
    packed_ptr,
    codes_ptr,
    count,
    rounds,
    given: tl.constexpr,
    block: tl.constexpr,
):
    """Rounds `count` groups into packed bytes and the scales' codes, uint8.

    `given`: the scales are FP32 at `scales_ptr`; else they are the max-calibrated ones.
    """
    divisor = divisor_of(global_ptr, words_ptr.dtype.element_ty == tl.int32)
    first = _first(rounds, block)
    for _ in range(rounds):
        group, there, places = _groups(first, count, block)
        words = tl.load(words_ptr + first * 8 + places, mask=there[:, None], other=0)
        if given:
            scale, code = e4m3(tl.load(scales_ptr + first + group, mask=there, other=1.0))
        else:
            scale, code = max_scale(number(largest_bits(words)), divisor)
        step = step_of(scale, divisor)[:, None]
        low, high, signs = _rounded(words, step, divisor)
        packed = ((low + high * 16).to(tl.uint32, bitcast=True) + nibble_signs(signs)).to(tl.uint8)
        tl.store(packed_ptr + first * 8 + places, packed, mask=there[:, None])
        tl.store(codes_ptr + first + group, code.to(tl.uint8), mask=there)
        first += block


@triton.jit
def _restored(packed_ptr, codes_ptr, divisor, group, there, places):
    """`e2m1 · (scale / global_scale)` of the even and of the odd columns."""
    packed = tl.load(packed_ptr + places, mask=there[:, None], other=0).to(tl.int32)
    code = tl.load(codes_ptr + group, mask=there, other=FIRST_NORMAL).to(tl.int32)
    step = step_of(e4m3_value(code), divisor)[:, None]
    even, odd = e2m1_value(packed & 7, (packed & 8) << 28), e2m1_value((packed >> 4) & 7, (packed >> 7) << 31)
    return even * step, odd * step


@triton.jit
def decode(packed_ptr, codes_ptr, global_ptr, result_ptr, count, block: tl.constexpr):
    """`e2m1 · (scale / global_scale)` as BF16 or FP32."""
    first = _first(1, block)
    group, there, places = _groups(first, count, block)
    divisor = divisor_of(global_ptr, True)
    even, odd = _restored(packed_ptr + first * 8, codes_ptr + first, divisor, group, there, places)
    _store(result_ptr + first * 16, group, there, even, odd)


@triton.jit
def fake_quantize(words_ptr, global_ptr, result_ptr, count, rounds, block: tl.constexpr):
    """Words quantized and back, as BF16 or FP32; a group with a NaN becomes NaN."""
    divisor = divisor_of(global_ptr, words_ptr.dtype.element_ty == tl.int32)
    first = _first(rounds, block)
    for _ in range(rounds):
        group, there, places = _groups(first, count, block)
        words = tl.load(words_ptr + first * 8 + places, mask=there[:, None], other=0)
        bits = largest_bits(words)
        scale, _ = max_scale(number(bits), divisor)
        step = tl.where(bits > INFINITY, float("nan"), step_of(scale, divisor))[:, None]
        even, odd, signs = _rounded(words, step, divisor)
        even_sign, odd_sign = unpaired(signs)
        _store(
            result_ptr + first * 16, group, there, e2m1_value(even, even_sign) * step, e2m1_value(odd, odd_sign) * step
        )
        first += block


@triton.jit
def squared_errors(
    words_ptr,
    packed_ptr,
    codes_ptr,
    global_ptr,
    errors_ptr,
    norms_ptr,
    count,
    block: tl.constexpr,
):
    """Σ (ŵ − w)² and Σ w² of every group, FP32."""
    first = _first(1, block)
    group, there, places = _groups(first, count, block)
    divisor = divisor_of(global_ptr, True)
    even_bits, odd_bits = unpaired(tl.load(words_ptr + first * 8 + places, mask=there[:, None], other=0))
    even, odd = number(even_bits), number(odd_bits)
    restored = _restored(packed_ptr + first * 8, codes_ptr + first, divisor, group, there, places)
    even_miss, odd_miss = restored[0] - even, restored[1] - odd
    tl.store(errors_ptr + first + group, sum_pairs(even_miss * even_miss + odd_miss * odd_miss), mask=there)
    tl.store(norms_ptr + first + group, sum_pairs(even * even + odd * odd), mask=there)
