"""The curvature of a Linear's output error in its weights, and the factor that GPTQ and replay walk along.

Minimised is ‖X (w − q)‖² = (w − q)ᵀ H (w − q) with H = XᵀX. With H + λI = F diag(cost) Fᵀ, F upper triangular with
ones on its diagonal, that is Σ_j cost_j (v_j − q_j)², where v_j = w_j + Σ_{i<j} F_ij (w_i − q_i) is known once the
columns before j are rounded: so a walk over the columns rounds v_j, and cost_j is what a miss there costs.
This is GPTQ (arXiv 2210.17323): its Cholesky factor U of the inverse is (F diag(√cost))⁻¹, but no inverse is needed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourge.methods.cholesky import factor_upper_, permute_symmetric_
from fourge.nvfp4.quantize import GROUP_SIZE

_TOKENS_PER_CHUNK = 4096
_COLUMNS_PER_BLOCK = 1024


class HessianAccumulator:
    """Sums XᵀX over the inputs X of a Linear, in FP32 (or `dtype`), and counts their tokens.

    On a GPU inputs of 16 bits are multiplied as they are, by its tensor cores: the products of two such numbers are
    exact in FP32, in which they are added up.

    It is summed in blocks of columns. Given `own`, `(n, of)`, only blocks n, n + of, … are, and the others are to be
    filled in, as other processes summed them.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        own: tuple[int, int] = (0, 1),
    ) -> None:
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=dtype, device=device)
        first, of = own
        self._own = range(first * _COLUMNS_PER_BLOCK, columns, of * _COLUMNS_PER_BLOCK)

    def add(self, x: Tensor, *, weight: float = 1.0, again: bool = False) -> None:
        """Adds `weight` XᵀX of inputs `[..., K]` of any float dtype; `again`: of tokens that are counted already."""
        tokens = x.reshape(-1, x.shape[-1])
        self.tokens += 0 if again else tokens.shape[0]
        for chunk in torch.split(tokens, _TOKENS_PER_CHUNK):
            x_tk = chunk if self._multiplies(chunk) else chunk.to(self._sum)
            # Only the blocks on and above the diagonal: half the arithmetic; `matrix` mirrors them.
            for start in self._own:
                block, left = self._sum[start : start + _COLUMNS_PER_BLOCK, start:], x_tk[:, start:]
                _add_product_(block, left[:, :_COLUMNS_PER_BLOCK].T, left, weight)

    def _multiplies(self, x: Tensor) -> bool:
        """Whether `x` can be multiplied as it is, into sums of our dtype."""
        return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and self._sum.dtype == torch.float32

    def summed_blocks(self) -> list[Tensor]:
        """Views of all that is summed, block by block: what is to be filled in where `own` left it out."""
        return [
            self._sum[start : start + _COLUMNS_PER_BLOCK, start:]
            for start in range(0, len(self._sum), _COLUMNS_PER_BLOCK)
        ]

    def summarise(self, x: Tensor) -> Tensor:
        """Nothing shorter than the inputs will do."""
        return x

    @property
    def diagonal(self) -> Tensor:
        """diag(XᵀX), `[K]`: every channel's sum of squares."""
        return self._sum.diagonal().clone()

    @property
    def matrix(self) -> Tensor:
        """XᵀX, `[K, K]`, symmetric to the bit: the accumulator's own memory, not a copy."""
        for start in range(0, self._sum.shape[0], _COLUMNS_PER_BLOCK):
            stop = start + _COLUMNS_PER_BLOCK
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            block = self._sum[start:stop, start:stop].triu_()
            block.add_(block.triu(1).T)
        return self._sum


def _add_product_(total: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
    """Adds `weight` times `left` `right` to `total`, in whose dtype sums are kept."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=weight)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=weight, out=total)


@dataclass(frozen=True)
class Curvature:
    """H + λI = F diag(cost) Fᵀ, rows and columns in the order in which the walk takes them.

    `order` int64 `[K]`, a permutation that keeps groups of 16 together; `feedback` F `[K, K]`, unit upper
    triangular; `cost` `[K]`, positive.
    """

    order: Tensor
    feedback: Tensor
    cost: Tensor


def by_activity(diagonal: Tensor) -> Tensor:
    """The walk's order for diag(H) `[K]`: the most active groups first, in each the most active channels first.

    What a column's rounding misses, only the columns after it can take up. So the costly ones come first, when there
    still are many, and the last ones are cheap.
    """
    groups = diagonal.view(-1, GROUP_SIZE)
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.sum(1).argsort(descending=True, stable=True)
    return (GROUP_SIZE * first[:, None] + within[first]).flatten()


def factorize(
    hessian: Tensor, order: Tensor, events: list[dict[str, Any]], linear: str, dampening: float = 0.05
) -> Curvature:
    """The factor of H + λI, λ = `dampening` times H's mean diagonal, for a walk in `order`. H `[K, K]`, FP32 or FP64,
    symmetric to the bit.

    A channel that was never active gets λ alone, so its weights round to the nearest. Where the Cholesky
    factorization fails, `dampening` is multiplied by ten until it works. Both are appended to `events` under the
    name `linear`, and so is an input that was zero throughout, for which every weight rounds to the nearest.

    F takes H's memory, and H is gone: at 53,248 columns it is 11.3 GB, and there is no room for a second.
    """
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean().item()
    assert 0 <= mean < torch.inf and dampening > 0, (mean, dampening)
    if mean == 0:
        events.append({"event": "inputs are all zero", "linear": linear})
        hessian.diagonal().fill_(1.0)
        return Curvature(order, hessian, torch.ones_like(diagonal))
    never = int((diagonal == 0).sum())
    if never:
        events.append({"event": "input channels never active", "linear": linear, "channels": never})
    permute_symmetric_(hessian, order)
    while not factor_upper_(hessian, dampening * mean):
        raised = 10 * dampening
        events.append({"event": "dampening raised", "linear": linear, "from": dampening, "to": raised})
        dampening = raised
    scale = hessian.diagonal().clone()
    return Curvature(order, hessian.triu_().div_(scale), scale.square())
