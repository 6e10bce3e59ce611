"""NVFP4's loops for a GPU, fused: every value is read once, and what lies between stays in registers (Triton).

The same FP32 operations in the same order as the tensor code in `quantize.py` and `scale_search.py`, so the same
bits. A row is a whole number of groups, so groups know nothing of rows: a program takes a `block` of them that lie one
after the other, and a thread has a group to itself. Values come and go in words, two a word: BF16 as int32, FP32 as
int64. So a word is a packed byte, and nothing has to be moved between threads.

What could change bits is not left to the compiler: divisions are IEEE's, conversions to E4M3 are integer arithmetic,
sums of 16 go by pairs, and `OPTIONS` forbid the contraction of a product and a sum.
"""

import triton
import triton.language as tl

from fourge.nvfp4.reference import E2M1_MAX, E4M3_MAX, ZERO_SCALE, e4m3_encode

OPTIONS = {"enable_fp_fusion": False}
"""For every launch: a product and a sum are rounded one after the other, as in torch, but where a kernel says `fma`."""

_SIX = tl.constexpr(E2M1_MAX)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_SIGN = tl.constexpr(-0x80000000)  # set bit by bit: Triton's minus is 0 − x, which has no −0.0
_HIGH_HALF = tl.constexpr(-0x10000)

_INTEGERS = tl.constexpr(2.0**23)  # FP32's numbers from here on
_E2M1_BIAS = tl.constexpr(2.0**126)

# Divisors under which no step is below 2⁻⁹⁸, nor so large that the format's smallest number over it is rounded to zero.
_MOST = tl.constexpr(2.0**-9 / 2.0**-98)
_LEAST_BF16, _LEAST_FP32 = tl.constexpr(E4M3_MAX / 2.0**16), tl.constexpr(E4M3_MAX)

_E4M3_MAX, _E4M3_NORMAL, _E4M3_STEP = (tl.constexpr(x) for x in (E4M3_MAX, 2.0**-6, 2.0**-9))
_TO_E4M3_STEPS = tl.constexpr(2.0**14)
_E4M3_SHIFT = tl.constexpr(20)  # FP32 has 20 mantissa bits more,
_E4M3_BIAS = tl.constexpr(120 << 3)  # and an exponent that is 120 larger
_SMALLEST, _FIRST_NORMAL, _LARGEST = tl.constexpr(1), tl.constexpr(8), tl.constexpr(126)
_ZERO_SCALE = tl.constexpr(e4m3_encode(ZERO_SCALE))


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _unpaired(words):
    """The FP32 bits of the even and of the odd columns."""
    if words.dtype == tl.int32:
        even, odd = words << 16, words & _HIGH_HALF
    else:
        even, odd = words.to(tl.int32), (words >> 32).to(tl.int32)
    return even, odd


@triton.jit
def _groups(count, block: tl.constexpr):
    """This program's groups `[block]`, which of them there are, and where their words lie `[block, 8]`."""
    group = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return group, group < count, group[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _store(result_ptr, group, there, even, odd):
    """FP32 values of the even and of the odd columns, in the dtype and the order of the result."""
    groups: tl.constexpr = even.shape[0]
    values = tl.reshape(tl.join(even, odd), (groups, 16)).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + group[:, None] * 16 + tl.arange(0, 16)[None, :], values, mask=there[:, None])


@triton.jit
def _ordinary(global_scale, bf16: tl.constexpr):
    """Whether under this divisor every step, 2⁻⁹ … 448 over it, is one by which `_scaled` may divide the fast way:
    remainders that matter are exact, and nothing underflows to zero.
    """
    enough = global_scale >= _LEAST_BF16 if bf16 else global_scale >= _LEAST_FP32
    return enough & (global_scale <= _MOST)


@triton.jit
def _scaled(magnitude, step, reciprocal, ordinary):
    """`magnitude` / `step` as IEEE rounds it where that is below 6; about 6 elsewhere.

    The division instruction is a dozen instructions long. Where there is no overflow or underflow to heed, the steps of
    Markstein (IBM J. Res. Dev. 34, 1990) give its bits: the rounded reciprocal, a quotient, and two corrections by
    what it leaves, which a fused multiply-add has exactly. The reciprocal serves a whole group.
    """
    if ordinary:
        magnitude = tl.minimum(magnitude, step * _SIX)
        scaled = magnitude * reciprocal
        scaled = tl.fma(tl.fma(scaled, 0.0 - step, magnitude), reciprocal, scaled)
        scaled = tl.fma(tl.fma(scaled, 0.0 - step, magnitude), reciprocal, scaled)
    else:
        scaled = tl.minimum(tl.math.div_rn(magnitude, step), _SIX)
    return scaled


@triton.jit
def _negative(x, step, ordinary):
    """Whether `x` / `step` is below zero: not where it underflows."""
    return x < 0.0 if ordinary else tl.math.div_rn(x, step) < 0.0


@triton.jit
def _index(scaled):
    """Bits of which the last three are the index of the E2M1 value nearest to a number x in 0 … 6, ties to even.

    The indices between two values grow as 2 x, x + 2 or x / 2 + 4 does, whichever is the least. Each is rounded by
    adding 2²³, where FP32's numbers are the integers. No compare: GPUs multiply and add at twice the rate.
    """
    small, large = tl.fma(scaled, 2.0, _INTEGERS), tl.fma(scaled, 0.5, _INTEGERS + 4.0)
    return _bits(tl.minimum(tl.minimum(small, scaled + (_INTEGERS + 2.0)), large))


@triton.jit
def _nearest(scaled):
    """The E2M1 value nearest to a number in 0 … 6."""
    return _number(_index(scaled) << 22) * _E2M1_BIAS


@triton.jit
def _nibble(x, step, reciprocal, ordinary):
    """The E2M1 code of the value nearest to `x` / `step`."""
    index = _index(_scaled(tl.abs(x), step, reciprocal, ordinary)) & 7
    return index | tl.where(_negative(x, step, ordinary), 8, 0)


@triton.jit
def _nibble_value(nibble):
    """E2M1's bits are FP32's but for a smaller bias: a power of two makes up for it, subnormal numbers included."""
    return _number(((nibble & 7) << 22) | ((nibble & 8) << 28)) * _E2M1_BIAS


@triton.jit
def _e4m3_code(x):
    """The code of the E4M3 value nearest to `x`, which is not negative."""
    subnormal = _bits(x + _TO_E4M3_STEPS) & 15
    bits = _bits(tl.minimum(x, _E4M3_MAX))
    normal = ((bits + 0x7FFFF + ((bits >> _E4M3_SHIFT) & 1)) >> _E4M3_SHIFT) - _E4M3_BIAS
    return tl.where(x < _E4M3_NORMAL, subnormal, normal)


@triton.jit
def _e4m3_value(code):
    normal = _number((code + _E4M3_BIAS) << _E4M3_SHIFT)
    return tl.where(code < _FIRST_NORMAL, code.to(tl.float32) * _E4M3_STEP, normal)


@triton.jit
def _largest_bits(even, odd):
    """The largest magnitude of each group as bits, which order as magnitudes do, NaN last."""
    return tl.max(tl.maximum(even & _MAGNITUDE, odd & _MAGNITUDE), axis=1)


@triton.jit
def _max_scale_code(largest, global_scale):
    """The max-calibrated scale of a group whose largest magnitude is `largest`, as a code."""
    code = _e4m3_code(global_scale * tl.math.div_rn(largest, _SIX))
    return tl.where(code == 0, _ZERO_SCALE, code)


@triton.jit
def _sum_pairs(even, odd):
    """Sums of pairs, of pairs of pairs, and so on, over each group; `[groups, 8]` to `[groups]`."""
    groups: tl.constexpr = even.shape[0]
    eight = even + odd
    first, second = tl.split(tl.reshape(eight, (groups, 4, 2)))
    first, second = tl.split(tl.reshape(first + second, (groups, 2, 2)))
    first, second = tl.split(first + second)
    return first + second


@triton.jit
def largest(words_ptr, partial_ptr, count, block: tl.constexpr):
    """The largest magnitude that each program saw, as bits, int32 `[programs]`."""
    _, there, places = _groups(count, block)
    even, odd = _unpaired(tl.load(words_ptr + places, mask=there[:, None], other=0))
    tl.store(partial_ptr + tl.program_id(0), tl.max(_largest_bits(even, odd), axis=0))


@triton.jit
def encode(
    words_ptr,
    global_ptr,
    scales_ptr,
    packed_ptr,
    codes_ptr,
    count,
    given: tl.constexpr,
    block: tl.constexpr,
):
    """Rounds `count` groups into packed bytes and the scales' codes, uint8.

    `given`: the scales are FP32 at `scales_ptr`; else they are the max-calibrated ones.
    """
    group, there, places = _groups(count, block)
    even, odd = _unpaired(tl.load(words_ptr + places, mask=there[:, None], other=0))
    global_scale = tl.load(global_ptr)
    if given:
        code = _e4m3_code(tl.load(scales_ptr + group, mask=there, other=1.0))
    else:
        code = _max_scale_code(_number(_largest_bits(even, odd)), global_scale)
    step = tl.math.div_rn(_e4m3_value(code), global_scale)[:, None]
    ordinary = _ordinary(global_scale, words_ptr.dtype.element_ty == tl.int32)
    reciprocal = tl.math.div_rn(1.0, step)
    low, high = _nibble(_number(even), step, reciprocal, ordinary), _nibble(_number(odd), step, reciprocal, ordinary)
    tl.store(packed_ptr + places, (low | (high << 4)).to(tl.uint8), mask=there[:, None])
    tl.store(codes_ptr + group, code.to(tl.uint8), mask=there)


@triton.jit
def _restored(packed_ptr, codes_ptr, global_ptr, group, there, places):
    """`e2m1 · (scale / global_scale)` of the even and of the odd columns."""
    packed = tl.load(packed_ptr + places, mask=there[:, None], other=0).to(tl.int32)
    code = tl.load(codes_ptr + group, mask=there, other=_FIRST_NORMAL).to(tl.int32)
    step = tl.math.div_rn(_e4m3_value(code), tl.load(global_ptr))[:, None]
    return _nibble_value(packed & 15) * step, _nibble_value(packed >> 4) * step


@triton.jit
def decode(packed_ptr, codes_ptr, global_ptr, result_ptr, count, block: tl.constexpr):
    """`e2m1 · (scale / global_scale)` as BF16 or FP32."""
    group, there, places = _groups(count, block)
    even, odd = _restored(packed_ptr, codes_ptr, global_ptr, group, there, places)
    _store(result_ptr, group, there, even, odd)


@triton.jit
def _rounded(x, step, reciprocal, ordinary):
    rounded = _nearest(_scaled(tl.abs(x), step, reciprocal, ordinary)) * step
    return _number(_bits(rounded) | tl.where(_negative(x, step, ordinary), _SIGN, 0))


@triton.jit
def fake_quantize(words_ptr, global_ptr, result_ptr, count, block: tl.constexpr):
    """Words quantized and back, as BF16 or FP32; a group with a NaN becomes NaN."""
    group, there, places = _groups(count, block)
    even, odd = _unpaired(tl.load(words_ptr + places, mask=there[:, None], other=0))
    global_scale = tl.load(global_ptr)
    bits = _largest_bits(even, odd)
    step = tl.math.div_rn(_e4m3_value(_max_scale_code(_number(bits), global_scale)), global_scale)
    step = tl.where(bits > _INFINITY, float("nan"), step)[:, None]
    ordinary = _ordinary(global_scale, words_ptr.dtype.element_ty == tl.int32)
    reciprocal = tl.math.div_rn(1.0, step)
    even = _rounded(_number(even), step, reciprocal, ordinary)
    odd = _rounded(_number(odd), step, reciprocal, ordinary)
    _store(result_ptr, group, there, even, odd)


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
    group, there, places = _groups(count, block)
    even_bits, odd_bits = _unpaired(tl.load(words_ptr + places, mask=there[:, None], other=0))
    even, odd = _number(even_bits), _number(odd_bits)
    even_restored, odd_restored = _restored(packed_ptr, codes_ptr, global_ptr, group, there, places)
    even_miss, odd_miss = even_restored - even, odd_restored - odd
    tl.store(errors_ptr + group, _sum_pairs(even_miss * even_miss, odd_miss * odd_miss), mask=there)
    tl.store(norms_ptr + group, _sum_pairs(even * even, odd * odd), mask=there)


@triton.jit
def _error_term(magnitude, step, reciprocal, h, ordinary):
    residual = _nearest(_scaled(magnitude, step, reciprocal, ordinary)) * step - magnitude
    return residual * residual * h


@triton.jit
def _error(even, odd, step, even_h, odd_h, ordinary):
    """Σ h (ŵ − w)² of each group of magnitudes. Signs do not matter."""
    step = step[:, None]
    reciprocal = tl.math.div_rn(1.0, step)
    return _sum_pairs(
        _error_term(even, step, reciprocal, even_h, ordinary), _error_term(odd, step, reciprocal, odd_h, ordinary)
    )


@triton.jit
def _clipping_term(magnitude, step, h):
    above = tl.maximum(magnitude - step * _SIX, 0.0)
    return above * above * h


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
    """The best scales of words, FP32: see `scale_search.py`.

    `h` FP32 `[K]`; `offsets` int32 `[trials]`, what to try around the start, in order, the max scale itself before
    them; `lowest` is the least of them. A program's groups go down together until none of them may gain.
    """
    group, there, places = _groups(count, block)
    even_bits, odd_bits = _unpaired(tl.load(words_ptr + places, mask=there[:, None], other=0))
    even, odd = _number(even_bits & _MAGNITUDE), _number(odd_bits & _MAGNITUDE)
    columns = (group % groups_a_row)[:, None] * 16 + 2 * tl.arange(0, 8)[None, :]
    even_h = tl.load(h_ptr + columns, mask=there[:, None], other=0.0)
    odd_h = tl.load(h_ptr + columns + 1, mask=there[:, None], other=0.0)
    global_scale = tl.load(global_ptr)

    best = _max_scale_code(_number(_largest_bits(even_bits, odd_bits)), global_scale)
    start = tl.maximum(best, _FIRST_NORMAL)
    ordinary = _ordinary(global_scale, words_ptr.dtype.element_ty == tl.int32)
    least = _error(even, odd, tl.math.div_rn(_e4m3_value(best), global_scale), even_h, odd_h, ordinary)
    for trial in range(trials):
        code = tl.minimum(tl.maximum(start + tl.load(offsets_ptr + trial), _SMALLEST), _LARGEST)
        error = _error(even, odd, tl.math.div_rn(_e4m3_value(code), global_scale), even_h, odd_h, ordinary)
        best = tl.where(error < least, code, best)
        least = tl.minimum(error, least)

    code = start + lowest
    alive = there
    going = 1
    while going > 0:
        code -= 1
        step = tl.math.div_rn(_e4m3_value(tl.maximum(code, _SMALLEST)), global_scale)
        clipping = _sum_pairs(_clipping_term(even, step[:, None], even_h), _clipping_term(odd, step[:, None], odd_h))
        alive = alive & (code >= _SMALLEST) & (clipping < least)
        error = _error(even, odd, step, even_h, odd_h, ordinary)
        better = alive & (error < least)
        best = tl.where(better, code, best)
        least = tl.where(better, error, least)
        going = tl.max(alive.to(tl.int32), axis=0)
    tl.store(scales_ptr + group, _e4m3_value(best), mask=there)
