"""`tuned`: weights moved, before `replay` rounds them, to make up for what is wrong with a quantized Linear's inputs.

Where the source's Linear multiplies x, the quantized one multiplies q: x in a lane in which all before it is quantized,
and after the rounding of activations where the engine does that. So W is not the best that could be rounded; that is
the ridge regression

    W* = argmin Σ ‖W x + r − W* q‖² + λ ‖W* − W‖²  =  W + (Σ u qᵀ) (Σ q qᵀ + λI)⁻¹,   u = W (x − q) + r,

as far as q foretells u; r is what the residual stream lacks, for a Linear that is added to it. This is GPTAQ's (arXiv
2504.02692) asymmetric objective, in closed form and with the activations' rounding in q. The sums go over both ways in
which a checkpoint is served, inputs rounded and weight-only: what makes up for the rounding alone is damage without it.
λ is chosen on other tokens than those that are fitted, and may be infinite: then W stays. The result is a Linear like
any other.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""λ over the mean diagonal of Σ q qᵀ."""

MOST_MOVED = 0.25
"""No ‖W* − W‖ / ‖W‖ is larger: what moves further gained nothing, and `fourge verify` still tells it from damage."""

MOST_COLUMNS = 32768
"""No wider Linear is compensated: three FP32 matrices of K² are 13 GB there, and 34 GB for a 405B model's 53,248."""

BLOCK_ROWS = 4096
_TOKENS_PER_CHUNK = 4096
_ROWS_SUMMED = 1024


class CrossMoment:
    """Sums Σ s qᵀ, FP32 `[S, K]`, over tokens: s is x − q, or u itself where the Linear stands alone and S = N.

    u = W s in the former case: with many rows in a group, the smaller of the two matrices is kept. Summed in blocks of
    rows, of which `own` are this process's, as a `HessianAccumulator`'s.
    """

    def __init__(
        self, size: int, columns: int, device: torch.device | str = "cpu", own: tuple[int, int] = (0, 1)
    ) -> None:
        self.sum = torch.zeros(size, columns, device=device)
        self._own = own

    def add(self, shortfall: Tensor, inputs: Tensor, weight: float = 1.0) -> None:
        """Adds `weight` times the sum over s `[T, S]` and q `[T, K]`."""
        for s, q in zip(*(torch.split(rows, _TOKENS_PER_CHUNK) for rows in (shortfall, inputs)), strict=True):
            columns, q_tk = s.float().split(_ROWS_SUMMED, dim=1), q.float()
            first, of = self._own
            for block, s_tn in zip(self.summed_blocks()[first::of], columns[first::of], strict=True):
                block.addmm_(s_tn.T, q_tk, alpha=weight)

    def summed_blocks(self) -> list[Tensor]:
        """See `HessianAccumulator.summed_blocks`."""
        return list(torch.split(self.sum, _ROWS_SUMMED))


@dataclass(frozen=True)
class Judge:
    """Other tokens' s `[T, S]` and q `[T, K]`: what λ is chosen on."""

    shortfall: Tensor
    inputs: Tensor


@dataclass(frozen=True)
class Compensated:
    """`weights` `[N, K]` in the source's dtype; `strength` is λ over the mean diagonal, None for W itself.

    `error` is the mean over Linears of Σ ‖u − (W* − W) q‖² / Σ ‖u‖² on the judge's tokens, its root: 1 for W itself.
    """

    weights: dict[str, Tensor]
    strength: float | None
    error: float


def compensate(
    weights: Mapping[str, Tensor], hessian: Tensor, cross: CrossMoment, judge: Judge, *, whole: bool
) -> Compensated:
    """The best W* among `STRENGTHS` for a group's `weights`, name → `[N, K]`; `hessian` Σ q qᵀ FP32 is left as it is.

    `whole`: `cross` and `judge` hold u, of the one Linear that there is, and not x − q. The less the penalty, the
    further weights move: so they are tried from the strongest on, until the judge's error rises.
    """
    best: tuple[float, float | None] = (1.0, None)
    mean = hessian.diagonal().mean().item()
    for strength in reversed(STRENGTHS) if mean > 0 else ():
        error = _error_at(strength * mean, weights, hessian, cross, judge, whole)
        if not error < best[0]:  # NaN is not
            break
        best = error, strength
    error, chosen = best
    if chosen is None:
        return Compensated(dict(weights), None, 1.0)
    root = _cholesky(hessian, chosen * mean)
    assert root is not None
    moved = {name: weight.clone() for name, weight in weights.items()}
    for weight in moved.values():
        for rows, step in _steps(weight, cross, root, whole):
            weight[rows] = (weight[rows].float() + step).to(weight.dtype)
    return Compensated(moved, chosen, error)


def _error_at(
    dampening: float, weights: Mapping[str, Tensor], hessian: Tensor, cross: CrossMoment, judge: Judge, whole: bool
) -> float:
    """`Compensated.error` with λ = `dampening`: infinite where the factorization fails or a weight moves too far."""
    root = _cholesky(hessian, dampening)
    if root is None:
        return math.inf
    tried = [_try(_steps(weight, cross, root, whole), weight, judge, whole) for weight in weights.values()]
    if not all(moved <= MOST_MOVED for _, moved in tried):
        return math.inf
    return math.sqrt(sum(left for left, _ in tried) / len(tried))


def _steps(weight: Tensor, cross: CrossMoment, root: Tensor, whole: bool) -> Iterator[tuple[slice, Tensor]]:
    """W* − W, FP32 `[n, K]`, by blocks of rows."""
    for start in range(0, len(weight), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(weight)))
        moment = cross.sum[rows] if whole else weight[rows].float() @ cross.sum
        yield rows, torch.cholesky_solve(moment.T, root).T


def _try(steps: Iterator[tuple[slice, Tensor]], weight: Tensor, judge: Judge, whole: bool) -> tuple[float, float]:
    """Σ ‖u − (W* − W) q‖² over Σ ‖u‖² on the judge's tokens, 1 where nothing is short; and ‖W* − W‖ / ‖W‖."""
    left = total = moved = norm = 0.0
    inputs = judge.inputs.float()
    for rows, step in steps:
        u = judge.shortfall[:, rows].float() if whole else judge.shortfall.float() @ weight[rows].float().T
        total += float(u.square().sum(dtype=torch.float64))
        left += float(torch.addmm(u, inputs, step.T, alpha=-1).square().sum(dtype=torch.float64))
        moved += float(step.square().sum(dtype=torch.float64))
        norm += float(weight[rows].float().square().sum(dtype=torch.float64))
    return left / total if total else 1.0, math.sqrt(moved / norm) if norm else 0.0


def _cholesky(hessian: Tensor, dampening: float) -> Tensor | None:
    """Lower triangular L with L Lᵀ = H + dampening · I; None where there is none in this precision."""
    lower = hessian.clone()
    lower.diagonal().add_(dampening)
    info = torch.empty((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))  # in place: no third matrix of that size
    return None if info.item() else lower
