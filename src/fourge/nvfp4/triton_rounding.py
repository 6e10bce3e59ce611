"""The arithmetic of a group on a GPU: its scale, its step, and numbers over that step rounded to E2M1 (Triton).

The bits of IEEE's divisions without one a value: what a group of 16 shares is worked out once, more exactly than FP32,
and then a value costs a product, a fused multiply-add and E2M1's index. Multiplications go first, for a GPU has twice
as many of them a cycle as of compares, shifts and selections. `docs/numerics.md` says why the bits are the same.
"""

import triton
import triton.language as tl

from fourge.nvfp4.reference import E2M1_MAX, E4M3_MAX, ZERO_SCALE, e4m3_encode

SIX = tl.constexpr(E2M1_MAX)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
SIGN = tl.constexpr(-0x80000000)  # set bit by bit: Triton's minus is 0 − x, which has no −0.0
E2M1_BIAS = tl.constexpr(2.0**126)

# Of a word of two BF16 numbers: the odd column's half, and both magnitudes; of one of two FP32 numbers: likewise.
_HIGH_HALF, _EVEN_SIGN, _MAGNITUDES = (tl.constexpr(x) for x in (-0x10000, 0x8000, 0x7FFF7FFF))
_WIDE_EVEN_SIGN, _WIDE_SIGN = tl.constexpr(0x80000000), tl.constexpr(-0x8000000000000000)
_WIDE_MAGNITUDES = tl.constexpr(0x7FFFFFFF7FFFFFFF)

_INTEGERS = tl.constexpr(2.0**23)  # FP32's numbers from here on
_TENTH = tl.constexpr(0.09999999403953552)  # the FP32 number below it
_SIXTH = tl.constexpr(0.1666666716337204)

# Divisors under which no step is below 2⁻⁹⁸, nor so large that the format's smallest number over it is rounded to zero.
_MOST = tl.constexpr(2.0**-9 / 2.0**-98)
_LEAST_BF16, _LEAST_FP32 = tl.constexpr(E4M3_MAX / 2.0**16), tl.constexpr(E4M3_MAX)
_UP, _DOWN = tl.constexpr(2.0**64), tl.constexpr(2.0**-64)
_VANISHING = tl.constexpr(2.0**64 * 2.0**-150)
_ENDLESS = tl.constexpr(2.0**100)

_E4M3_MAX, _E4M3_NORMAL, _E4M3_STEP = (tl.constexpr(x) for x in (E4M3_MAX, 2.0**-6, 2.0**-9))
_TO_E4M3_STEPS = tl.constexpr(2.0**14)
_E4M3_SHIFT = tl.constexpr(20)  # FP32 has 20 mantissa bits more,
_E4M3_BIAS = tl.constexpr(120 << 3)  # and an exponent that is 120 larger
_E4M3_BITS = tl.constexpr(-0x100000)
SMALLEST, FIRST_NORMAL, LARGEST = tl.constexpr(1), tl.constexpr(8), tl.constexpr(126)
_ZERO_CODE, _ZERO_SCALE = tl.constexpr(e4m3_encode(ZERO_SCALE)), tl.constexpr(ZERO_SCALE)


@triton.jit
def bits_of(x):
    """FP32's bits, int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def number(bits):
    """The FP32 number of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unpaired(words):
    """The FP32 bits of the even and of the odd columns."""
    if words.dtype == tl.int32:
        even, odd = words << 16, words & _HIGH_HALF
    else:
        even, odd = words.to(tl.int32), (words >> 32).to(tl.int32)
    return even, odd


@triton.jit
def magnitudes(words):
    """Likewise, without their signs: as bits they order as the numbers do, NaN last."""
    if words.dtype == tl.int32:
        even, odd = unpaired(words & _MAGNITUDES)
    else:
        even, odd = unpaired(words)
        even, odd = even & MAGNITUDE, odd & MAGNITUDE
    return even, odd


@triton.jit
def largest_bits(words):
    """The largest magnitude of each group, as FP32's bits."""
    even, odd = magnitudes(words)
    return tl.max(tl.maximum(even, odd), axis=1)


@triton.jit
def divisor_of(global_ptr, bf16: tl.constexpr):
    """A global scale and what goes with it: its reciprocal, whether it is an ordinary one, and what makes up if not.

    Under an ordinary one nothing overflows or underflows on the way to an index, and no quotient does to zero. Under
    any other, magnitudes and steps are multiplied by a power of two first, which their quotients do not see.
    """
    global_scale = tl.load(global_ptr)
    enough = global_scale >= _LEAST_BF16 if bf16 else global_scale >= _LEAST_FP32
    ordinary = enough & (global_scale <= _MOST)
    shift = tl.where(ordinary, 1.0, tl.where(global_scale > 1.0, _UP, _DOWN))
    return global_scale, tl.math.div_rn(1.0, global_scale), ordinary, shift


@triton.jit
def e4m3(x):
    """The E4M3 value nearest to `x`, which is not negative, and its code."""
    steps = x + _TO_E4M3_STEPS
    bits = bits_of(tl.minimum(x, _E4M3_MAX))
    bits += 0x7FFFF + ((bits >> _E4M3_SHIFT) & 1)
    subnormal = x < _E4M3_NORMAL
    code = tl.where(subnormal, bits_of(steps) & 15, (bits >> _E4M3_SHIFT) - _E4M3_BIAS)
    return tl.where(subnormal, steps - _TO_E4M3_STEPS, number(bits & _E4M3_BITS)), code


@triton.jit
def e4m3_value(code):
    """FP32, of an E4M3 code that is not negative."""
    normal = number((code + _E4M3_BIAS) << _E4M3_SHIFT)
    return tl.where(code < FIRST_NORMAL, code.to(tl.float32) * _E4M3_STEP, normal)


@triton.jit
def max_scale(largest, divisor):
    """The max-calibrated scale of a group whose largest magnitude is `largest`, and its code."""
    global_scale, _, ordinary, _ = divisor
    if ordinary:  # Markstein's steps, as below; where a sixth is subnormal the scale is the smallest one
        sixth = largest * _SIXTH
        sixth = tl.fma(tl.fma(sixth, 0.0 - SIX, largest), _SIXTH, sixth)
    else:
        sixth = tl.math.div_rn(largest, SIX)
    scale, code = e4m3(global_scale * sixth)
    return tl.where(code == 0, _ZERO_SCALE, scale), tl.where(code == 0, _ZERO_CODE, code)


@triton.jit
def step_of(scale, divisor):
    """`scale` / global scale as IEEE rounds it."""
    global_scale, inverse, ordinary, _ = divisor
    if ordinary:  # Markstein (IBM J. Res. Dev. 34, 1990): a quotient, and a correction by what it leaves
        step = scale * inverse
        step = tl.fma(tl.fma(step, 0.0 - global_scale, scale), inverse, step)
    else:
        step = tl.math.div_rn(scale, global_scale)
    return step


@triton.jit
def eighth_of(step, divisor):
    """An eighth of 1 / `step`: an FP32 number that is not above it, and what is missing; and eight steps. All shifted.

    Not above it, so that what is missing is not negative, and no sum with it is ∞ − ∞.
    """
    _, _, _, shift = divisor
    step = tl.minimum(step * shift, _ENDLESS)
    reciprocal = tl.math.div_rn(1.0, step)
    above = bits_of(tl.fma(reciprocal, 0.0 - step, 1.0)) >> 31  # −1 where it is
    below = number(bits_of(reciprocal) + above)
    missing = tl.fma(below, 0.0 - step, 1.0) * (reciprocal * 0.125)
    return below * 0.125, missing, step * 8.0


@triton.jit
def index(magnitude, eighth, fp32: tl.constexpr):
    """Bits of which the last three are the index of the E2M1 value nearest to `magnitude` / step, ties to even.

    An eighth of the quotient is clipped to 0 … 1, which costs nothing. The indices between two values grow as 2 x,
    x + 2 or a tenth of x and 6 does, whichever is the least. Each is rounded by adding 2²³, where FP32's numbers are
    the integers; positive numbers order as their bits, of which three are compared at once.
    """
    below, missing, eight_steps = eighth
    scaled = tl.clamp(tl.fma(magnitude, below, magnitude * missing), 0.0, 1.0)
    if fp32:  # BF16's eight bits are told from a tie without another correction
        scaled = tl.clamp(tl.fma(tl.fma(scaled, 0.0 - eight_steps, magnitude), below, scaled), 0.0, 1.0)
    return index_of_eighth(scaled)


@triton.jit
def index_of_eighth(scaled):
    """`index` of a quotient of which `scaled` is an eighth, 0 … 1."""
    small = bits_of(tl.fma(scaled, 16.0, _INTEGERS))
    middle = bits_of(tl.fma(scaled, 8.0, _INTEGERS + 2.0))
    large = bits_of(tl.fma(scaled, 8.0 * _TENTH, _INTEGERS + 6.0))
    return tl.minimum(tl.minimum(small, middle), large)


@triton.jit
def shifted(even, odd, divisor):
    """Magnitudes as `index` takes them."""
    _, _, ordinary, shift = divisor
    if not ordinary:
        even, odd = even * shift, odd * shift
    return even, odd


@triton.jit
def split(words, step, divisor):
    """The even and the odd columns' magnitudes, as `index` takes them, and their sign bits in words.

    No sign for zeros, nor for quotients that underflow to zero.
    """
    _, _, ordinary, shift = divisor
    bf16: tl.constexpr = words.dtype == tl.int32
    most: tl.constexpr = _MAGNITUDES if bf16 else _WIDE_MAGNITUDES
    even_sign: tl.constexpr = _EVEN_SIGN if bf16 else _WIDE_EVEN_SIGN
    odd_sign: tl.constexpr = SIGN if bf16 else _WIDE_SIGN
    even_bits, odd_bits = magnitudes(words)
    even, odd = number(even_bits), number(odd_bits)
    if ordinary:
        signs = words & ((words & most) + most)
        signs = (signs & even_sign) | (signs & odd_sign)
    else:
        vanishing = step * _VANISHING
        signs = tl.where(even * _UP > vanishing, even_sign, 0) | tl.where(odd * _UP > vanishing, odd_sign, 0)
        signs = words & signs.to(words.dtype)
        even, odd = even * shift, odd * shift
    return even, odd, signs


@triton.jit
def nibble_signs(signs):
    """The sign bits of words where a byte of two codes has them, in the last byte."""
    if signs.dtype == tl.int32:
        bits = signs.to(tl.uint32, bitcast=True)
        bits = (bits >> 12) + (bits >> 24)
    else:
        bits = signs.to(tl.uint64, bitcast=True)
        bits = (bits >> 28).to(tl.uint32) + (bits >> 56).to(tl.uint32)
    return bits


@triton.jit
def e2m1_value(index, sign):
    """E2M1's bits are FP32's but for a smaller bias: a power of two makes up for it, subnormal numbers included."""
    return number((index << 22) + sign) * E2M1_BIAS


@triton.jit
def sum_pairs(x):
    """Sums of pairs, of pairs of pairs, and so on, over each group; `[groups, 4 or 8]` to `[groups]`."""
    groups: tl.constexpr = x.shape[0]
    if x.shape[1] == 8:
        first, second = tl.split(tl.reshape(x, (groups, 4, 2)))
        x = first + second
    first, second = tl.split(tl.reshape(x, (groups, 2, 2)))
    first, second = tl.split(first + second)
    return first + second
