"""Slow twins in FP64, from the papers' formulas: U of the inverse, S of a group, one number at a time."""

import torch
from torch import Tensor

from fourge.nvfp4 import reference

POSITIVE_SCALES = [reference.e4m3_decode(code) for code in range(1, 127)]
E2M1 = torch.tensor(sorted({reference.e2m1_decode(code) for code in range(16)}), dtype=torch.float64)


def nearest_value(x: Tensor) -> Tensor:
    """The nearest E2M1 values by looking at all of them (ties do not occur in random data)."""
    return E2M1[(x[..., None] - E2M1).abs().argmin(-1)]


def dampened(hessian: Tensor, dampening: float) -> Tensor:
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    return hessian + dampening * hessian.diagonal().mean() * identity


def upper_of_inverse(hessian: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = H⁻¹."""
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def gptq_textbook(weight: Tensor, steps: Tensor, hessian: Tensor) -> Tensor:
    """E2M1 values of `weight` `[N, K]` under `steps` `[N, K/16]`."""
    upper = upper_of_inverse(hessian)
    w, values = weight.clone(), torch.empty_like(weight)
    for j in range(w.shape[1]):
        step = steps[:, j // 16]
        values[:, j] = nearest_value(w[:, j] / step)
        error = (w[:, j] - values[:, j] * step) / upper[j, j]
        for k in range(j, w.shape[1]):
            w[:, k] -= error * upper[j, k]
    return values


def replay_textbook(
    weight: Tensor, scales: Tensor, global_scale: float, hessian: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """E2M1 values and scales of `weight` `[N, K]`, the five steps of `replay` row by row."""
    upper = upper_of_inverse(hessian)
    values, chosen = torch.empty_like(weight), torch.empty_like(scales)
    for row in range(len(weight)):
        w = weight[row].clone()
        for group in range(len(w) // 16):
            columns = slice(16 * group, 16 * group + 16)
            inner = upper[columns, columns]
            s_matrix = torch.linalg.inv(inner.T @ inner)
            start = w[columns].clone()
            scale = scales[row, group].item()
            best_score = float("inf")
            for candidate in [scale, *proposed(start, s_matrix, scale, global_scale, window)]:
                replayed, ints = replay_group(start, inner, candidate / global_scale)
                score = ((start - replayed) @ s_matrix @ (start - replayed)).item()
                if score < best_score:
                    best_score, chosen[row, group], values[row, columns] = score, candidate, ints
            step = chosen[row, group].item() / global_scale
            for j in range(columns.start, columns.stop):
                error = (w[j] - values[row, j] * step) / upper[j, j]
                w[j:] -= error * upper[j, j:]
    return values, chosen


def proposed(start: Tensor, s_matrix: Tensor, scale: float, global_scale: float, window: int) -> list[float]:
    step = scale / global_scale
    for _ in range(3):
        q = nearest_value(start / step)
        if (along := (q @ s_matrix @ start).item()) > 0:
            step = along / (q @ s_matrix @ q).item()
    middle = min(range(126), key=lambda i: abs(POSITIVE_SCALES[i] - step * global_scale))
    return POSITIVE_SCALES[max(0, middle - window) : middle + window + 1]


def replay_group(start: Tensor, inner: Tensor, step: float) -> tuple[Tensor, Tensor]:
    w, ints = start.clone(), torch.empty_like(start)
    for j in range(16):
        ints[j] = nearest_value(w[j] / step)
        w[j:] -= (w[j] - ints[j] * step) / inner[j, j] * inner[j, j:]
    return ints * step, ints
