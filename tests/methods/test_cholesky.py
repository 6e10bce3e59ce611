"""The factorization within a matrix's own memory, against torch's of a copy."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourge.methods.cholesky import factor_upper_, permute_symmetric_

PANELS = [1, 7, 32, 100, 512]


def positive_definite(columns: int = 100, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(columns), dtype=dtype)
    return x.T @ (x * torch.linspace(0.1, 3, 3 * columns, dtype=dtype)[:, None])


def symmetric(columns: int, dtype: torch.dtype) -> Tensor:
    matrix = positive_definite(columns, dtype)
    return matrix.triu() + matrix.triu(1).T


def torchs_factor(matrix: Tensor) -> Tensor:
    """R of matrix = R Rᵀ, upper triangular, by torch's lower one of the matrix backwards."""
    return torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)


@pytest.mark.parametrize("panel", PANELS)
def test_order(panel: int) -> None:
    matrix, order = torch.randn(100, 100), torch.randperm(100)
    expected = matrix[order][:, order]
    permute_symmetric_(matrix, order, panel)
    assert matrix.equal(expected)


@pytest.mark.parametrize("panel", PANELS)
def test_factor_in_fp64(panel: int) -> None:
    matrix = symmetric(100, torch.float64)
    expected = torchs_factor(matrix + 0.5 * torch.eye(100))
    assert factor_upper_(matrix, 0.5, panel)
    torch.testing.assert_close(matrix.triu(), expected, rtol=1e-12, atol=1e-12)


def test_fp32_is_as_near_to_fp64_as_torchs_own() -> None:
    matrix = symmetric(1600, torch.float32)
    truth = torchs_factor(matrix.double())
    theirs = (torchs_factor(matrix) - truth).norm()
    assert factor_upper_(matrix, 0.0, 100)
    assert (matrix.triu() - truth).norm() < 2 * theirs


def test_one_panel_is_torchs_own_to_the_bit() -> None:
    matrix = symmetric(100, torch.float32)
    expected = torchs_factor(matrix)
    assert factor_upper_(matrix, 0.0, 100)
    assert matrix.triu().equal(expected)


@pytest.mark.parametrize("panel", PANELS)
def test_lower_triangle_is_neither_read_nor_written(panel: int) -> None:
    matrix = symmetric(100, torch.float64)
    expected = torchs_factor(matrix)
    below = torch.ones_like(matrix).tril(-1).bool()
    matrix[below] = torch.nan
    assert factor_upper_(matrix, 0.0, panel)
    assert matrix[below].isnan().all()
    torch.testing.assert_close(matrix[~below], expected[~below], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("column", [0, 31, 32, 99])  # worked on last, first: from the last panel to the first
@pytest.mark.parametrize("panel", PANELS)
def test_failure_leaves_the_matrix_as_it_was(column: int, panel: int) -> None:
    matrix = symmetric(100, torch.float32)
    matrix[column, column] = -1e4
    before = matrix.clone()
    assert not factor_upper_(matrix, 0.1, panel)
    assert matrix.equal(before)


class LargestStorage(TorchDispatchMode):
    """Notes the bytes of the largest storage that any operation returns, `given` left out."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self._given = given.untyped_storage().data_ptr()
        self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self._given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("added", [0.1, -1e6])  # the second fails
def test_no_second_matrix_is_held(added: float) -> None:
    matrix = symmetric(640, torch.float32)
    order = torch.randperm(640)
    with LargestStorage(matrix) as largest:
        permute_symmetric_(matrix, order, 32)
        assert factor_upper_(matrix, added, 32) == (added > 0)
    assert 0 < largest.nbytes <= 2 * 32 * 640 * 4
