"""Schur replay's turn of a group for a CPU, fused: see `methods/replay.py`, whose bits these are (numba).

Rows lie side by side, a lane each, and the candidates are tried one after the other.
"""

from typing import Any

import numpy as np

from fourge.nvfp4.numba_kernels import (
    _LARGEST,
    _SIX,
    _SMALLEST,
    _ZERO,
    _bits,
    _e4m3_code,
    _e4m3_value,
    _inlined,
    _kernel,
    _rounder,
)

LANES = 64


@_inlined
def _nearest(x):
    """The nearest E2M1 value; a negative number's zero is −0.0."""
    magnitude = min(abs(x), _SIX)
    rounder = _rounder(magnitude)
    value = (magnitude + rounder) - rounder
    return -value if x < _ZERO else value


@_inlined
def _add_forward(totals, feedback, x):
    """Adds Fᵀ x to `totals`, both `[16, lanes]`."""
    for i in range(len(x)):
        for j in range(i, len(x)):
            factor = feedback[i, j]
            for lane in range(LANES):
                totals[j, lane] += factor * x[i, lane]


@_inlined
def _propose(weight, fed, feedback, cost, alternating, steps, goal, free, rounded, terms):
    """Takes `steps` `[lanes]` to the real-valued ones that fit best, by turns with the rounding."""
    for j in range(len(fed)):
        for lane in range(LANES):
            goal[j, lane] = fed[j, lane]
    _add_forward(goal, feedback, weight)
    for j in range(len(fed)):
        for lane in range(LANES):
            free[j, lane] = goal[j, lane]
    for i in range(len(free)):
        for j in range(i + 1, len(free)):
            factor = feedback[i, j]
            for lane in range(LANES):
                free[j, lane] -= factor * free[i, lane]
    along, norm = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for _ in range(alternating):
        for lane in range(LANES):
            along[lane] = norm[lane] = _ZERO
        for j in range(len(free)):
            for lane in range(LANES):
                terms[j, lane] = _nearest(free[j, lane] / steps[lane])
                rounded[j, lane] = _ZERO
        _add_forward(rounded, feedback, terms)
        for j in range(len(free)):
            for lane in range(LANES):
                weighted = rounded[j, lane] * cost[j]
                along[lane] += weighted * goal[j, lane]
                norm[lane] += weighted * rounded[j, lane]
        for lane in range(LANES):
            steps[lane] = along[lane] / norm[lane] if along[lane] > _ZERO else steps[lane]


@_inlined
def _try(weight, fed, feedback, cost, steps, targets, values, miss, scores):
    """Replays GPTQ over the columns for `steps` `[lanes]`: E2M1 values `[16, lanes]` and scores `[lanes]`."""
    for lane in range(LANES):
        scores[lane] = _ZERO
    for j in range(len(weight)):
        for lane in range(LANES):
            targets[j, lane] = fed[j, lane] + weight[j, lane]
    for j in range(len(weight)):
        for lane in range(LANES):
            values[j, lane] = _nearest(targets[j, lane] / steps[lane])
            rounded = values[j, lane] * steps[lane]
            miss[lane] = weight[j, lane] - rounded
            short = targets[j, lane] - rounded
            scores[lane] += short * short * cost[j]
        for k in range(j + 1, len(weight)):
            factor = feedback[j, k]
            for lane in range(LANES):
                targets[k, lane] += factor * miss[lane]


@_kernel
def replay_group(
    weight: Any,
    fed: Any,
    feedback: Any,
    cost: Any,
    scales: Any,
    global_scale: np.float32,
    window: int,
    alternating: int,
    codes: Any,
    chosen: Any,
    start: int,
    stop: int,
) -> None:
    """A group's turn for rows `start … stop` of `[16, n]`: writes `codes` and `chosen`, and w − q over `fed`."""
    shape = (len(weight), LANES)
    w, f = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    goal, free, terms = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.float32)
    values, best_values = np.empty(shape, np.float32), np.empty(shape, np.float32)
    candidate, best, steps = np.ones(LANES, np.float32), np.ones(LANES, np.float32), np.empty(LANES, np.float32)
    middle, better, least = np.empty(LANES, np.int32), np.empty(LANES, np.bool_), np.empty(LANES, np.float32)
    miss, scores = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(start, stop, LANES):
        count = min(LANES, stop - first)
        for lane in range(count):
            candidate[lane] = scales[first + lane]
            for j in range(len(w)):
                w[j, lane] = weight[j, first + lane]
                f[j, lane] = fed[j, first + lane]
        for lane in range(LANES):
            steps[lane] = candidate[lane] / global_scale
        _propose(w, f, feedback, cost, alternating, steps, goal, free, values, terms)
        for lane in range(LANES):
            middle[lane] = max(_e4m3_code(max(steps[lane] * global_scale, _ZERO)), _SMALLEST)
        for trial in range(2 * window + 2):
            for lane in range(LANES):
                code = min(max(middle[lane] + np.int32(trial - 1 - window), _SMALLEST), _LARGEST)
                candidate[lane] = _e4m3_value(code) if trial > 0 else candidate[lane]
                steps[lane] = candidate[lane] / global_scale
            _try(w, f, feedback, cost, steps, free, values, miss, scores)
            for lane in range(LANES):
                better[lane] = (trial == 0) | (scores[lane] < least[lane])
                least[lane] = scores[lane] if better[lane] else least[lane]
                best[lane] = candidate[lane] if better[lane] else best[lane]
            for j in range(len(w)):
                for lane in range(LANES):
                    best_values[j, lane] = values[j, lane] if better[lane] else best_values[j, lane]
        for lane in range(count):
            chosen[first + lane] = best[lane]
            step = best[lane] / global_scale
            for j in range(len(w)):
                value = best_values[j, lane]
                index = _bits(abs(value) + _rounder(abs(value))) & np.int32(7)
                codes[j, first + lane] = np.uint8(index | (np.int32(8) if _bits(value) < np.int32(0) else np.int32(0)))
                fed[j, first + lane] = w[j, lane] - value * step
