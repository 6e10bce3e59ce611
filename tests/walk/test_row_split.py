"""Weights quantized by pieces of rows, more than one of them: the same bytes as the rows at once."""

import pytest
import torch

from fourge.methods import METHODS
from fourge.methods.base import Method
from fourge.methods.fp8 import Fp8Rows
from fourge.methods.hessian import HessianAccumulator
from fourge.methods.observe import InputStatistics
from fourge.walk.ranks import ALONE
from fourge.walk.row_split import pieces_of, quantize_by_rows


@pytest.mark.parametrize("method", [*METHODS.values(), Fp8Rows()], ids=[*METHODS, "fp8"])
def test_pieces_make_up_the_whole(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(rows, 64, generator=generator).bfloat16() for name, rows in (("a", 2100), ("b", 70))}
    inputs = torch.randn(256, 64, generator=generator)
    assert [piece.rows.start for piece in pieces_of(weights)] == [0, 1024, 2048, 0]

    def seen() -> InputStatistics:
        statistics = InputStatistics(weigh_channels=True)
        statistics.add(statistics.summarise(inputs))
        statistics.hessian = HessianAccumulator(64)
        statistics.hessian.add(inputs)
        return statistics

    at_once = method.prepare_group(weights, seen(), [])
    whole = {name: at_once(weight) for name, weight in weights.items()}
    for name, (quantized, error) in quantize_by_rows(
        weights, weights, method.prepare_group(weights, seen(), []), ALONE
    ).items():
        assert type(quantized) is type(whole[name]) and 0 < error < 0.2
        for part, expected in zip(vars(quantized).values(), vars(whole[name]).values(), strict=True):
            assert (part.shape, part.dtype) == (expected.shape, expected.dtype)
            assert torch.equal(part.view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8))
