"""Problems like those in language models (heavy tails, correlated channels, a few loud ones) and their error."""

from typing import Any

import torch
from torch import Tensor

from fourge.methods.hessian import Curvature, by_activity, factorize
from fourge.nvfp4.quantize import QuantizedWeight, amax, dequantize_weight, global_scale, group_scales


def left_to_right(diagonal: Tensor) -> Tensor:
    """The columns as they stand, as textbooks walk them."""
    return torch.arange(diagonal.shape[0])


ORDERS = [left_to_right, by_activity]


def max_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    divisor = global_scale(amax(weight))
    return group_scales(weight.float(), divisor), divisor


def curvature_of(x: Tensor, order_of: Any = left_to_right, events: list[dict[str, Any]] | None = None) -> Curvature:
    hessian = x.T @ x
    return factorize(hessian, order_of(hessian.diagonal()), [] if events is None else events, "linear")


def same_bytes(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return a.packed.equal(b.packed) and a.scale.view(torch.uint8).equal(b.scale.view(torch.uint8))


def output_error(x: Tensor, weight: Tensor, quantized: QuantizedWeight) -> float:
    difference = weight.double() - dequantize_weight(quantized).double()
    return (x.double() @ difference.T).norm().item()


def problem(seed: int, rows: int = 24, columns: int = 64, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """`weight` `[rows, columns]` and inputs `[tokens, columns]`, FP32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = columns // 4
    x = normal(tokens, rank) @ normal(rank, columns) / rank**0.5 + 0.2 * normal(tokens, columns)
    x *= torch.exp(0.5 * normal(columns))
    x[:, torch.randperm(columns, generator=generator)[:2]] *= 10
    weight = normal(rows, columns) * torch.exp(0.3 * normal(rows, 1)) * 0.02
    weight[torch.rand(rows, columns, generator=generator) < 0.01] *= 8
    return weight, x
