"""NVFP4's loops for a CPU, fused: every value is read once, and what lies between stays in the first cache (numba).

The same FP32 operations in the same order as the tensor code in `quantize.py` and `scale_search.py`, so the same
bits: no fused multiply-add, no reciprocals, sums of 16 by pairs. A kernel works on rows `start … stop` of contiguous
arrays; BF16 comes and goes as its bits, uint16, anything else as FP32. Rows know nothing of each other, and the GIL
is released, so rows may be split over threads.

Written for the compiler's vectorizer: inner loops start at 0, run over one-dimensional buffers, and are not unrolled
(hence `group` and `lanes`, always the same and yet arguments). A call that is not inlined counts references to every
array that it is given, which takes longer than a short loop. Numba takes a bare 6 for an int64 and 6.0 for a float64,
and would compute in those; hence the constants.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from fourge.nvfp4.reference import E2M1_MAX, E4M3_MAX, ZERO_SCALE, e4m3_encode

LANES = 64
"""Groups that are searched side by side: several vector registers full, and all of it within the first cache."""

PLACES = np.array([0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15])
"""Where each of a group's 16 values lies among those of all lanes: the bits of its number in reverse, so that pairs,
and pairs of pairs, lie half of everything apart, and are summed in one loop. Its own inverse."""

_ZERO, _HALF, _TWO, _FOUR, _SIX = (np.float32(x) for x in (0, 0.5, 2, 4, E2M1_MAX))
_INFINITY_BITS = np.int32(0x7F800000)

# To add one of these rounds to a multiple of ½, 1 or 2, ties to even, for that is the distance of FP32 numbers there;
# the last three bits of the sum are E2M1's index, hence the 2 and the 4 steps on top.
_TO_HALVES, _TO_ONES, _TO_TWOS = (np.float32(x) for x in (2.0**22, 2.0**23 + 2, 2.0**24 + 8))

_E4M3_MAX, _E4M3_NORMAL, _E4M3_STEP = (np.float32(x) for x in (E4M3_MAX, 2.0**-6, 2.0**-9))
_TO_E4M3_STEPS = np.float32(2.0**14)
_E4M3_SHIFT = np.int32(20)  # FP32 has 20 mantissa bits more,
_E4M3_BIAS = np.int32(120 << 3)  # and an exponent that is 120 larger
_SMALLEST, _FIRST_NORMAL, _LARGEST = np.int32(1), np.int32(8), np.int32(126)
_ZERO_SCALE = np.int32(e4m3_encode(ZERO_SCALE))

# Division by zero gives IEEE's answer: raising instead would be a branch in every loop.
_inlined = njit(error_model="numpy", nogil=True, forceinline=True)
_kernel = njit(error_model="numpy", nogil=True, cache=True)


@_inlined
def _bits(x):
    return np.float32(x).view(np.int32)


@_inlined
def _from_bits(bits):
    return np.int32(bits).view(np.float32)


def _load(row, values):
    """A row as FP32."""
    raise NotImplementedError


@overload(_load)
def _load_as(row, values):
    def from_bf16(row, values):
        for k in range(len(values)):
            values[k] = _from_bits(np.int32(row[k]) << np.int32(16))

    def from_fp32(row, values):
        for k in range(len(values)):
            values[k] = row[k]

    return from_bf16 if row.dtype == types.uint16 else from_fp32


def _store(values, row):
    """A row of FP32 values; BF16's bits are rounded to the nearest, ties to even, and NaN stays NaN."""
    raise NotImplementedError


@overload(_store)
def _store_as(values, row):
    def to_bf16(values, row):
        for k in range(len(values)):
            bits = _bits(values[k])
            rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
            nan = (bits & np.int32(0x7FFFFFFF)) > _INFINITY_BITS
            row[k] = np.uint16((np.int32(0x7FC0) if nan else rounded) & np.int32(0xFFFF))

    def to_fp32(values, row):
        for k in range(len(values)):
            row[k] = values[k]

    return to_bf16 if row.dtype == types.uint16 else to_fp32


@_inlined
def _rounder(magnitude):
    """What rounds a number of at most 6 to E2M1 when it is added."""
    return _TO_HALVES if magnitude < _TWO else (_TO_ONES if magnitude < _FOUR else _TO_TWOS)


@_inlined
def _e4m3_code(x):
    """The code of the E4M3 value nearest to `x`, which is not negative."""
    subnormal = _bits(x + _TO_E4M3_STEPS) & np.int32(15)
    bits = _bits(min(x, _E4M3_MAX))
    normal = ((bits + np.int32(0x7FFFF) + ((bits >> _E4M3_SHIFT) & np.int32(1))) >> _E4M3_SHIFT) - _E4M3_BIAS
    return subnormal if x < _E4M3_NORMAL else normal


@_inlined
def _e4m3_value(code):
    return np.float32(code) * _E4M3_STEP if code < _FIRST_NORMAL else _from_bits((code + _E4M3_BIAS) << _E4M3_SHIFT)


@_inlined
def _max_scale_code(largest, global_scale):
    """The max-calibrated scale of a group whose largest magnitude is `largest`, as a code."""
    code = _e4m3_code(global_scale * (largest / _SIX))
    return _ZERO_SCALE if code == np.int32(0) else code


@_inlined
def _largest_bits(values, first, count):
    """The largest magnitude of `count` values from `first` on, as bits, which order as magnitudes do, NaN last."""
    largest = np.int32(0)
    for j in range(count):
        largest = max(largest, _bits(values[first + j]) & np.int32(0x7FFFFFFF))
    return largest


@_kernel
def encode(
    weight: Any, global_scale: np.float32, scales: Any, packed: Any, codes: Any, group: int, start: int, stop: int
) -> None:
    """Rounds `weight` `[N, K]` into `packed` uint8 `[N, K/2]` and the scales' codes, uint8 `[N, K/16]`.

    `scales` FP32 `[N, K/16]`; an empty one asks for the max-calibrated ones.
    """
    values, nibbles = np.empty(weight.shape[1], np.float32), np.empty(weight.shape[1], np.uint8)
    for n in range(start, stop):
        _load(weight[n], values)
        for g in range(codes.shape[1]):
            first = g * group
            if len(scales) == 0:
                code = _max_scale_code(_from_bits(_largest_bits(values, first, group)), global_scale)
            else:
                code = _e4m3_code(scales[n, g])
            codes[n, g] = code
            step = _e4m3_value(code) / global_scale
            for j in range(group):
                scaled = values[first + j] / step
                magnitude = min(abs(scaled), _SIX)
                index = _bits(magnitude + _rounder(magnitude)) & np.int32(7)
                nibbles[first + j] = np.uint8(index | (np.int32(8) if scaled < _ZERO else np.int32(0)))
        pairs = packed[n]
        for pair in range(len(pairs)):
            pairs[pair] = nibbles[2 * pair] | (nibbles[2 * pair + 1] << np.uint8(4))


@_inlined
def _restore(packed, codes, global_scale, nibbles, values, group):
    """A row's `e2m1 · (scale / global_scale)`, FP32 `[K]`."""
    for pair in range(len(packed)):
        nibbles[2 * pair] = packed[pair] & np.uint8(15)
        nibbles[2 * pair + 1] = packed[pair] >> np.uint8(4)
    for g in range(len(codes)):
        first = g * group
        step = _e4m3_value(np.int32(codes[g])) / global_scale
        for j in range(group):
            nibble = np.int32(nibbles[first + j])
            index = nibble & np.int32(7)
            large = _from_bits((index << np.int32(22)) + np.int32(126 << 23))
            magnitude = np.float32(index) * _HALF if index < np.int32(2) else large
            values[first + j] = (-magnitude if nibble > np.int32(7) else magnitude) * step


@_kernel
def decode(packed: Any, codes: Any, global_scale: np.float32, result: Any, group: int, start: int, stop: int) -> None:
    """`e2m1 · (scale / global_scale)` into `result` `[N, K]`."""
    values, nibbles = np.empty(result.shape[1], np.float32), np.empty(result.shape[1], np.uint8)
    for n in range(start, stop):
        _restore(packed[n], codes[n], global_scale, nibbles, values, group)
        _store(values, result[n])


@_kernel
def fake_quantize(x: Any, global_scale: np.float32, result: Any, group: int, start: int, stop: int) -> None:
    """`x` `[T, K]` quantized and back into `result`, of the same kind; a group with a NaN becomes NaN."""
    values = np.empty(x.shape[1], np.float32)
    for n in range(start, stop):
        _load(x[n], values)
        for g in range(len(values) // group):
            first = g * group
            bits = _largest_bits(values, first, group)
            step = _e4m3_value(_max_scale_code(_from_bits(bits), global_scale)) / global_scale
            if bits > _INFINITY_BITS:
                step = np.float32(np.nan)
            for j in range(group):
                scaled = values[first + j] / step
                magnitude = min(abs(scaled), _SIX)
                rounder = _rounder(magnitude)
                rounded = ((magnitude + rounder) - rounder) * step
                values[first + j] = -rounded if scaled < _ZERO else rounded
        _store(values, result[n])


@_inlined
def _error_term(magnitude, step, h):
    scaled = min(magnitude / step, _SIX)
    rounder = _rounder(scaled)
    residual = ((scaled + rounder) - rounder) * step - magnitude
    return residual * residual * h


@_inlined
def _clipping_term(magnitude, step, h):
    above = max(magnitude - _SIX * step, _ZERO)
    return above * above * h


@_inlined
def _sum_errors(even, odd, even_h, odd_h, steps, sums):
    """Leaves Σ h (ŵ − w)² of each lane in the first of `sums`; all are `[8 · lanes]`. Signs do not matter."""
    for i in range(len(steps)):
        sums[i] = _error_term(even[i], steps[i], even_h[i]) + _error_term(odd[i], steps[i], odd_h[i])
    _sum_halves(sums)


@_inlined
def _sum_clipping(even, odd, even_h, odd_h, steps, sums):
    """Leaves Σ h max(|w| − 6 step, 0)² of each lane in the first of `sums`."""
    for i in range(len(steps)):
        sums[i] = _clipping_term(even[i], steps[i], even_h[i]) + _clipping_term(odd[i], steps[i], odd_h[i])
    _sum_halves(sums)


@_inlined
def _sum_halves(sums):
    """Sums of pairs of pairs, and so on, for each lane of the sums of pairs: see `PLACES`."""
    count = len(sums)
    for _ in range(3):
        count //= 2
        for i in range(count):
            sums[i] = sums[i] + sums[count + i]


@_inlined
def _set_steps(codes, global_scale, steps):
    """The step of each lane, once for each of its eight pairs."""
    lanes = len(codes)
    for lane in range(lanes):
        steps[lane] = _e4m3_value(np.int32(codes[lane])) / global_scale
    while lanes < len(steps):
        for lane in range(lanes):
            steps[lanes + lane] = steps[lane]
        lanes *= 2


@_inlined
def _try_steps(codes, alive, first, even, odd, even_h, odd_h, steps, sums, best, least):
    """Takes the code of each lane that is `alive` where its step errs less than the best so far, or is the `first`."""
    _sum_errors(even, odd, even_h, odd_h, steps, sums)
    for lane in range(len(codes)):
        better = alive[lane] & (first | (sums[lane] < least[lane]))
        best[lane] = np.int32(codes[lane] if better else best[lane])
        least[lane] = sums[lane] if better else least[lane]


@_inlined
def _spread(values, first, magnitudes):
    """The groups of `values` from `first` on as `magnitudes` `[16, lanes]`."""
    for lane in range(magnitudes.shape[1]):
        for j in range(16):
            magnitudes[PLACES[j], lane] = abs(values[first + lane * 16 + j])


@_inlined
def _start(magnitudes, global_scale, codes, begin):
    """The max scale's code of each lane, and the one that is tried around; true where they differ anywhere."""
    differ = False
    for lane in range(len(codes)):
        largest = magnitudes[0, lane]
        for j in range(1, 16):
            largest = max(largest, magnitudes[j, lane])
        codes[lane] = _max_scale_code(largest, global_scale)
        begin[lane] = max(codes[lane], _FIRST_NORMAL)
        differ |= begin[lane] != codes[lane]
    return differ


@_inlined
def _go_down(begin, distance, codes, alive):
    """Codes `distance` below; a lane that comes to the end is not alive."""
    for lane in range(len(codes)):
        code = np.int32(begin[lane] - distance)
        alive[lane] &= code >= _SMALLEST
        codes[lane] = max(code, _SMALLEST)


@_inlined
def _may_gain(clipping, least, alive):
    """Leaves alive the lanes whose clipping alone costs less than their best so far; whether there are any."""
    any_alive = False
    for lane in range(len(least)):
        alive[lane] &= clipping[lane] < least[lane]
        any_alive |= alive[lane]
    return any_alive


@_kernel
def search(
    weight: Any, global_scale: np.float32, h: Any, offsets: Any, scales: Any, lanes: int, start: int, stop: int
) -> None:
    """The best scales of `weight` `[N, K]`, FP32 `[N, K/16]`: see `scale_search.py`.

    `h` FP32 `[chunks, 2, 8 · lanes]`, the groups' weights a lane each, in the order of `PLACES`; `offsets` int32, what
    to try around the start, in order, the max scale itself before them. All lanes go down together until none of them
    may gain; the last chunk's lanes beyond K/16 compute with zeros and are left out.
    """
    values = np.zeros(len(h) * lanes * 16, np.float32)
    row = values[: weight.shape[1]]
    magnitudes = np.empty((16, lanes), np.float32)
    even, odd = magnitudes[:8].reshape(8 * lanes), magnitudes[8:].reshape(8 * lanes)
    steps, sums = np.empty(8 * lanes, np.float32), np.empty(8 * lanes, np.float32)
    least, alive = np.empty(lanes, np.float32), np.empty(lanes, np.bool_)
    begin, codes, best = np.empty(lanes, np.int32), np.empty(lanes, np.int32), np.empty(lanes, np.int32)
    for n in range(start, stop):
        _load(weight[n], row)
        for chunk in range(len(h)):
            even_h, odd_h = h[chunk, 0], h[chunk, 1]
            _spread(values, chunk * lanes * 16, magnitudes)
            moved = _start(magnitudes, global_scale, codes, begin)
            alive[:] = True
            _set_steps(codes, global_scale, steps)
            _try_steps(codes, alive, True, even, odd, even_h, odd_h, steps, sums, best, least)
            for offset in offsets:
                if offset == 0 and not moved:
                    continue  # the max scale itself
                for lane in range(lanes):
                    codes[lane] = min(max(np.int32(begin[lane] + offset), _SMALLEST), _LARGEST)
                _set_steps(codes, global_scale, steps)
                _try_steps(codes, alive, False, even, odd, even_h, odd_h, steps, sums, best, least)
            distance = -offsets.min()
            while True:
                distance += 1
                _go_down(begin, distance, codes, alive)
                _set_steps(codes, global_scale, steps)
                _sum_clipping(even, odd, even_h, odd_h, steps, sums)
                if not _may_gain(sums, least, alive):
                    break
                _try_steps(codes, alive, False, even, odd, even_h, odd_h, steps, sums, best, least)
            for lane in range(min(lanes, scales.shape[1] - chunk * lanes)):
                scales[n, chunk * lanes + lane] = _e4m3_value(best[lane])


@_kernel
def squared_errors(
    weight: Any,
    packed: Any,
    codes: Any,
    global_scale: np.float32,
    errors: Any,
    norms: Any,
    group: int,
    start: int,
    stop: int,
) -> None:
    """Σ (ŵ − w)² and Σ w² of every group of `weight` `[N, K]`, both FP32 `[N, K/16]`."""
    columns = weight.shape[1]
    values, restored = np.empty(columns, np.float32), np.empty(columns, np.float32)
    nibbles = np.empty(columns, np.uint8)
    for n in range(start, stop):
        _load(weight[n], values)
        _restore(packed[n], codes[n], global_scale, nibbles, restored, group)
        for k in range(columns):
            difference = restored[k] - values[k]
            restored[k] = difference * difference
            values[k] = values[k] * values[k]
        _sum_row(restored, errors[n])
        _sum_row(values, norms[n])


@_inlined
def _sum_row(terms, sums):
    """The sums of every 16 of `terms`, by pairs; `terms` are overwritten."""
    count = len(terms)
    for _ in range(4):
        count //= 2
        for i in range(count):
            terms[i] = terms[2 * i] + terms[2 * i + 1]
    for g in range(len(sums)):
        sums[g] = terms[g]
