"""The curvature of a Linear's output error in its weights, and the factor that GPTQ and replay walk along.

Minimised is ‖X (w − q)‖² = (w − q)ᵀ H (w − q) with H = XᵀX. With H + λI = F diag(cost) Fᵀ, F upper triangular with
ones on its diagonal, that is Σ_j cost_j (v_j − q_j)², where v_j = w_j + Σ_{i<j} F_ij (w_i − q_i) is known once the
columns to its left are rounded: so the walk left to right rounds v_j, and cost_j says what a miss there costs.
This is GPTQ (arXiv 2210.17323), whose Cholesky factor U of the inverse is (F diag(√cost))⁻¹; no inverse is needed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS_PER_CHUNK = 4096
COLUMNS_PER_BLOCK = 1024


class HessianAccumulator:
    """Sums XᵀX over the inputs X of a Linear, in FP32 (or `dtype`), and counts their tokens."""

    def __init__(
        self, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=dtype, device=device)

    def add(self, x: Tensor) -> None:
        """Takes inputs `[..., K]` of any float dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        self.tokens += tokens.shape[0]
        for chunk in tokens.split(TOKENS_PER_CHUNK):
            x_tk = chunk.to(self._sum)
            # Only the blocks on and above the diagonal: half the arithmetic, the rest is mirrored when read.
            for start in range(0, x_tk.shape[1], COLUMNS_PER_BLOCK):
                stop = start + COLUMNS_PER_BLOCK
                self._sum[start:stop, start:].addmm_(x_tk[:, start:stop].T, x_tk[:, start:])

    @property
    def diagonal(self) -> Tensor:
        """diag(XᵀX), `[K]`: every channel's sum of squares."""
        return self._sum.diagonal().clone()

    @property
    def matrix(self) -> Tensor:
        """XᵀX, `[K, K]`, symmetric: the accumulator's own memory, not a copy."""
        for start in range(0, self._sum.shape[1], COLUMNS_PER_BLOCK):
            stop = start + COLUMNS_PER_BLOCK
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        return self._sum


@dataclass(frozen=True)
class Curvature:
    """H + λI = F diag(cost) Fᵀ: `feedback` F `[K, K]`, unit upper triangular, and `cost` `[K]`, positive."""

    feedback: Tensor
    cost: Tensor


def factorize(hessian: Tensor, events: list[dict[str, Any]], linear: str, dampening: float = 0.05) -> Curvature:
    """The factor of H + λI, λ = `dampening` times H's mean diagonal. H `[K, K]` symmetric, FP32 or FP64.

    A channel that was never active gets λ alone, so its weights round to the nearest. Where the Cholesky
    factorization fails, `dampening` is multiplied by ten until it works. Both are appended to `events` under the
    name `linear`, and so is an input that was zero throughout, for which every weight rounds to the nearest.
    At its peak two matrices of H's size are held beside H.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    assert 0 <= mean < torch.inf and dampening > 0, (mean, dampening)
    if mean == 0:
        events.append({"event": "inputs are all zero", "linear": linear})
        identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
        return Curvature(identity, torch.ones_like(diagonal))
    dead = int((diagonal == 0).sum())
    if dead:
        events.append({"event": "input channels never active", "linear": linear, "channels": dead})
    root = _cholesky(hessian, dampening * mean)
    while root is None:
        raised = 10 * dampening
        events.append({"event": "dampening raised", "linear": linear, "from": dampening, "to": raised})
        dampening = raised
        root = _cholesky(hessian, dampening * mean)
    scale = root.diagonal().clone()
    return Curvature(root.div_(scale), scale.square())


def _cholesky(hessian: Tensor, dampening: float) -> Tensor | None:
    """Upper triangular R `[K, K]` with R Rᵀ = H + dampening · I, None where there is no such R.

    torch factors into a lower triangle times its transpose; reversing rows and columns turns one into the other.
    """
    reverse = hessian.flip(0, 1)
    reverse.diagonal().add_(dampening)
    lower, info = torch.linalg.cholesky_ex(reverse)
    del reverse
    return None if info.item() else lower.flip(0, 1)
