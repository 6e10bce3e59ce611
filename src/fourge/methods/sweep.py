"""The walk over a weight's columns, left to right, that GPTQ and replay share."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fourge.nvfp4.quantize import GROUP_SIZE

# Values of a weight worked on at once: rows are independent, and wide weights would double the memory otherwise.
VALUES_PER_CHUNK = 2**25


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows of `[N, K]` with about VALUES_PER_CHUNK values each."""
    rows = max(1, VALUES_PER_CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def sweep(work: Tensor, feedback: Tensor, block_size: int, commit: Callable[[slice, Tensor], None]) -> None:
    """Calls `commit(columns, block)` for every `block_size` columns, left to right, feedback applied before.

    `work` `[K, N]` holds the weights, transposed: `block`, a view of `work`, arrives as w + Σ Fᵀ(w − q) over all
    columns to the left of the block, and `commit` leaves w − q of its own columns there. `feedback` F `[K, K]`.
    Halving recurs down to the blocks, so that nearly all of the arithmetic is in large matrix products.
    """

    def descend(start: int, stop: int) -> None:
        blocks = -(-(stop - start) // block_size)
        if blocks == 1:
            commit(slice(start, stop), work[start:stop])
            return
        middle = start + blocks // 2 * block_size
        descend(start, middle)
        work[middle:stop].addmm_(feedback[start:middle, middle:stop].T, work[start:middle])
        descend(middle, stop)

    descend(0, work.shape[0])


def group_steps(scales: Tensor, global_scale: Tensor) -> Tensor:
    """The step c/G of every group, `[K/16, N]`, from `scales` `[N, K/16]`."""
    return (scales / global_scale).T.contiguous()


def feed_back(targets: Tensor, residuals: Tensor, column_of_feedback: Tensor) -> Tensor:
    """`targets` `[...]` plus Σ_i F_i (w_i − q_i) over the columns i of `residuals` `[i, ...]`."""
    return torch.tensordot(column_of_feedback, residuals, 1).add_(targets)
