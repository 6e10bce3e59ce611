"""NVFP4 in plain Python, one number at a time: the specification that the tensor code is held against.

E2M1 (OCP Microscaling Formats 1.0, §5.3.3): sign, two exponent bits, one mantissa bit. E4M3 (OCP FP8 1.0, the
"FN" kind): sign, four exponent bits, three of mantissa, no infinity. What the format computes in FP32 is rounded
to FP32 after every operation, so these functions give the bits, not just the values.
"""

import math
import struct

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_POSITIVE = 2.0**-9
GLOBAL_RANGE = E4M3_MAX * E2M1_MAX
"""What the largest magnitude of a tensor is mapped to: the largest group scale times the largest value."""

ZERO_SCALE = 0.125
"""Stands for a group scale that rounds to zero, as in compressed-tensors. The group's values all become zero
under it (they are below 6 · 2⁻¹⁰), and nothing is ever divided by zero."""

FP32_TINY = 2.0**-126


def fp32(x: float) -> float:
    """`x` rounded to the nearest FP32 number, ties to even; beyond the range an infinity."""
    try:
        value: float = struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)
    return value


def e2m1_decode(code: int) -> float:
    """The value of a 4-bit code, `sign << 3 | index`; code 8 is −0.0."""
    magnitude = E2M1_MAGNITUDES[code & 7]
    return -magnitude if code & 8 else magnitude


def e2m1_round(x: float) -> float:
    """The nearest E2M1 value, a tie to the even code; beyond ±6 it is ±6.

    A negative number that rounds to zero gives −0.0, −0.0 itself gives 0.0: so it is in compressed-tensors.
    """
    magnitude = min(abs(x), E2M1_MAX)
    index = min(range(8), key=lambda i: (abs(E2M1_MAGNITUDES[i] - magnitude), i % 2))
    return -E2M1_MAGNITUDES[index] if x < 0 else E2M1_MAGNITUDES[index]


def e2m1_encode(value: float) -> int:
    """The code of a value on the grid; raises ValueError for any other."""
    return E2M1_MAGNITUDES.index(abs(value)) | (8 if math.copysign(1.0, value) < 0 else 0)


def pack(low: int, high: int) -> int:
    """Two codes in a byte; `low` belongs to the even column."""
    return low | high << 4


def unpack(byte: int) -> tuple[int, int]:
    """The codes of the even and the odd column."""
    return byte & 15, byte >> 4


def e4m3_decode(code: int) -> float:
    """The value of an 8-bit code; 0x7F and 0xFF are NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * E4M3_MIN_POSITIVE
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


_E4M3_MAGNITUDES = tuple(e4m3_decode(code) for code in range(0x7F))


def e4m3_round(x: float) -> float:
    """The nearest E4M3 value, a tie to the even code; beyond ±448 it is ±448, so no NaN comes of a finite number."""
    magnitude = min(abs(x), E4M3_MAX)
    code = min(range(0x7F), key=lambda c: (abs(_E4M3_MAGNITUDES[c] - magnitude), c % 2))
    return math.copysign(_E4M3_MAGNITUDES[code], x)


def e4m3_encode(value: float) -> int:
    """The code of a value on the grid; raises ValueError for any other."""
    return _E4M3_MAGNITUDES.index(abs(value)) | (0x80 if math.copysign(1.0, value) < 0 else 0)


def global_scale(amax: float) -> float:
    """The divisor `448 · 6 / amax` in FP32; 1.0 where that overflows (amax 0 or below 8e-36).

    The reciprocal is taken first and rounded, as torch does when it divides a number by a tensor; the oracle's
    bits depend on it.
    """
    scale = fp32(GLOBAL_RANGE * fp32(1.0 / max(amax, FP32_TINY)))
    return 1.0 if math.isinf(scale) else scale


def group_scale(amax: float, global_scale: float) -> float:
    """The E4M3 scale of a group whose largest magnitude is `amax`, under max calibration; never zero."""
    scale = e4m3_round(min(fp32(global_scale * fp32(amax / E2M1_MAX)), E4M3_MAX))
    return scale if scale != 0 else ZERO_SCALE


def quantize_value(x: float, scale: float, global_scale: float) -> float:
    """The E2M1 value of `x` under a group scale and the global divisor."""
    return e2m1_round(fp32(x / fp32(scale / global_scale)))


def dequantize_value(value: float, scale: float, global_scale: float) -> float:
    """What an E2M1 value stands for: `value · (scale / global_scale)`, in this order."""
    return fp32(value * fp32(scale / global_scale))
