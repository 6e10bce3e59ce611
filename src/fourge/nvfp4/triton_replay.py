"""Schur replay's turn of a group for a GPU, fused: see `methods/replay.py`, whose bits these are (Triton).

A thread has a row: the candidates one after the other, 16 columns one after the other, all of it in registers. So what
is one number a row there is a vector here, and a group's 16 columns are a tuple of them.
"""

import triton
import triton.language as tl

from fourge.nvfp4.triton_rounding import (
    LARGEST,
    SIGN,
    SIX,
    SMALLEST,
    divisor_of,
    e2m1_value,
    e4m3,
    e4m3_value,
    eighth_of,
    index,
    index_of_eighth,
    shifted,
    step_of,
)


@triton.jit
def _value(nibble):
    return e2m1_value(nibble & 7, (nibble & 8) << 28)


@triton.jit
def _fed_forward(total, feedback_ptr, stride, x, column: tl.constexpr):
    """`total` + Σ F_ij x_i over the columns i before `column`, j."""
    for before in tl.static_range(column):
        total += tl.load(feedback_ptr + before * stride + column) * x[before]
    return total


@triton.jit
def _proposal(weight, fed, feedback_ptr, stride, cost_ptr, step, alternating):
    """The real-valued step that fits the group best, by turns with the rounding."""
    goal, free = (), ()
    for j in tl.static_range(16):
        goal += (_fed_forward(fed[j], feedback_ptr, stride, weight, j) + weight[j],)
        left = goal[j]
        for i in tl.static_range(j):
            left -= tl.load(feedback_ptr + i * stride + j) * free[i]
        free += (left,)
    for _ in range(alternating):
        along, norm, values = tl.zeros_like(step), tl.zeros_like(step), ()
        for j in tl.static_range(16):
            scaled = tl.math.div_rn(free[j], step)
            nearest = index_of_eighth(tl.minimum(tl.abs(scaled), SIX) * 0.125)
            values += (e2m1_value(nearest, tl.where(scaled < 0.0, SIGN, 0)),)
            rounded = _fed_forward(tl.zeros_like(step), feedback_ptr, stride, values, j) + values[j]
            weighted = rounded * tl.load(cost_ptr + j)
            along += weighted * goal[j]
            norm += weighted * rounded
        step = tl.where(along > 0.0, tl.math.div_rn(along, norm), step)
    return step


@triton.jit
def _try(weight, fed, feedback_ptr, stride, cost_ptr, step, divisor):
    """Replays GPTQ over the columns: E2M1 codes, four bits each, of the first and the last eight, and the score."""
    eighth = eighth_of(step, divisor)
    first, last = tl.zeros_like(step).to(tl.int32), tl.zeros_like(step).to(tl.int32)
    score, misses = tl.zeros_like(step), ()
    for j in tl.static_range(16):
        target = _fed_forward(fed[j] + weight[j], feedback_ptr, stride, misses, j)
        magnitude, _ = shifted(tl.abs(target), target, divisor)
        nibble = (index(magnitude, eighth, True) & 7) | tl.where(target < 0.0, 8, 0)
        rounded = _value(nibble) * step
        misses += (weight[j] - rounded,)
        short = target - rounded
        score += short * short * tl.load(cost_ptr + j)
        if j < 8:
            first |= nibble << (4 * j)
        else:
            last |= nibble << (4 * j - 32)
    return first, last, score


@triton.jit
def replay_group(
    weight_ptr,
    fed_ptr,
    feedback_ptr,
    cost_ptr,
    scales_ptr,
    global_ptr,
    codes_ptr,
    chosen_ptr,
    count,
    stride,
    window,
    alternating,
    block: tl.constexpr,
):
    """A group's turn for `block` of the `count` rows of `[16, count]`: writes codes and scales, and w − q over fed.

    `feedback_ptr` is that of the group's own block of F, whose rows are `stride` apart.
    """
    row = tl.program_id(0) * block + tl.arange(0, block)
    there = row < count
    weight, fed = (), ()
    for j in tl.static_range(16):
        weight += (tl.load(weight_ptr + tl.cast(count, tl.int64) * j + row, mask=there, other=0.0),)
        fed += (tl.load(fed_ptr + tl.cast(count, tl.int64) * j + row, mask=there, other=0.0),)
    scale = tl.load(scales_ptr + row, mask=there, other=1.0)
    global_scale = tl.load(global_ptr)
    divisor = divisor_of(global_ptr, False)

    step = step_of(scale, divisor)
    proposed = _proposal(weight, fed, feedback_ptr, stride, cost_ptr, step, alternating)
    _, nearest = e4m3(tl.maximum(proposed * global_scale, 0.0))
    middle = tl.maximum(nearest, SMALLEST)
    chosen, least = scale, tl.zeros_like(step)
    best_first, best_last = tl.zeros_like(middle), tl.zeros_like(middle)
    for trial in range(2 * window + 2):  # the scale that came first, then those around the proposal
        around = e4m3_value(tl.minimum(tl.maximum(middle + (trial - 1 - window), SMALLEST), LARGEST))
        candidate = tl.where(trial == 0, scale, around)
        step = step_of(candidate, divisor)
        first, last, score = _try(weight, fed, feedback_ptr, stride, cost_ptr, step, divisor)
        better = (score < least) | (trial == 0)
        least = tl.where(better, score, least)
        chosen = tl.where(better, candidate, chosen)
        best_first, best_last = tl.where(better, first, best_first), tl.where(better, last, best_last)
    step = step_of(chosen, divisor)
    for j in tl.static_range(16):
        nibble = (best_first >> (4 * j) if j < 8 else best_last >> (4 * j - 32)) & 15
        place = tl.cast(count, tl.int64) * j + row
        tl.store(codes_ptr + place, nibble.to(tl.uint8), mask=there)
        tl.store(fed_ptr + place, weight[j] - _value(nibble) * step, mask=there)
    tl.store(chosen_ptr + row, chosen, mask=there)
