"""A large symmetric matrix put in another order and factored, both within its own memory.

The factor is R Rᵀ, R upper triangular: Cholesky's, taken from the last column to the first. It is worked out a panel
of columns at a time, each from the panels after it (left-looking), and takes the place of the upper triangle. The
strict lower triangle keeps the matrix, so that a factorization that fails can be undone and tried again.
"""

import torch
from torch import Tensor

_PANEL = 512
_ROWS_PER_SOLVE = 4096


def permute_symmetric_(matrix: Tensor, order: Tensor, panel: int = _PANEL) -> None:
    """Makes `matrix` `[K, K]`, any, `matrix[order][:, order]`; beside it, `panel` of its rows are held."""
    for rows in torch.split(matrix, panel):
        rows.copy_(rows.index_select(1, order))
    for columns in torch.split(matrix, panel, dim=1):
        columns.copy_(columns.index_select(0, order))


def factor_upper_(matrix: Tensor, added: float, panel: int = _PANEL) -> bool:
    """Puts R, with R Rᵀ = `matrix` + `added` · I, into the upper triangle of `matrix` `[K, K]`, FP32 or FP64.

    The strict lower triangle is not touched. Where there is no such R, `matrix` is left as it was and False returned.
    Beside it, a few times `panel` of its rows are held.
    """
    diagonal = matrix.diagonal().clone()
    matrix.diagonal().add_(added)
    for start in reversed(range(0, len(matrix), panel)):
        if not _factor_panel(matrix, start, min(start + panel, len(matrix))):
            _restore_upper_(matrix, diagonal, panel)
            return False
    return True


def _factor_panel(matrix: Tensor, start: int, stop: int) -> bool:
    """R's columns `start` to `stop` from those after them; False where the panel's own block has no factor."""
    own = slice(start, stop)
    after = matrix[own, stop:]
    block = torch.addmm(matrix[own, own], after, after.T, alpha=-1)
    # torch factors into a lower triangle times its transpose, and of the block reads the lower triangle alone.
    lower, info = torch.linalg.cholesky_ex(block.flip(0, 1))
    if info.item():
        return False
    root = lower.flip(0, 1)
    matrix[own, own].tril_(-1).add_(root)
    for rows in torch.split(matrix[:start], _ROWS_PER_SOLVE):
        rows[:, own].addmm_(rows[:, stop:], after.T, alpha=-1)
        rows[:, own].copy_(torch.linalg.solve_triangular(root.T, rows[:, own], upper=False, left=False))
    return True


def _restore_upper_(matrix: Tensor, diagonal: Tensor, panel: int) -> None:
    """The upper triangle from the strict lower one, and the diagonal."""
    for start in range(0, len(matrix), panel):
        stop = start + panel
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
        block = matrix[start:stop, start:stop].tril_(-1)
        block.add_(block.T.clone())
    matrix.diagonal().copy_(diagonal)
