"""Where the exponents of smoothing go: which tensors are multiplied by which powers of two, and exactly so.

2^−k into what feeds a group's input (a norm's weight, or the rows and bias of `up_proj` and `v_proj`), 2^k into the
columns of the Linears that read it. What the layer computes stays the same to the bit.
"""

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fourge.checkpoint.architecture import LinearGroup
from fourge.methods.smooth import MOST, Tie, powers_of_two

_BLOCK_VALUES = 4 << 20


@dataclass(frozen=True)
class Scaling:
    """Tensor `name`, relative to the layer, times 2^`exponents` (int8, its size along `dim`) along `dim`."""

    name: str
    dim: int
    exponents: Tensor


def find_tie(group: LinearGroup, shapes: Mapping[str, tuple[int, ...]], key_value_heads: int) -> Tie:
    """How the channels that feed `group` become its inputs; `shapes` by name relative to the layer."""
    fed, inputs = shapes[f"{group.fed_by}.weight"][0], shapes[f"{group.linears[0]}.weight"][1]
    return Tie() if fed == inputs else Tie(key_value_heads, inputs // fed)


def scalings(group: LinearGroup, exponents: Tensor, tie: Tie, names: Collection[str]) -> list[Scaling]:
    """What smoothing `group` by `exponents`, int8 `[P]`, does to the layer's tensors, whose names are `names`."""
    feeding = [f"{group.fed_by}.{kind}" for kind in ("weight", "bias")]
    inputs = tie.to_inputs(exponents)
    return [Scaling(name, 0, -exponents) for name in feeding if name in names] + [
        Scaling(f"{linear}.weight", 1, inputs) for linear in group.linears
    ]


def scale_(tensor: Tensor, dim: int, exponents: Tensor) -> None:
    """Multiplies `tensor` by 2^`exponents` along `dim`, in place."""
    tensor.mul_(_along(tensor, dim, exponents))


def survives(tensor: Tensor, dim: int, exponents: Tensor) -> Tensor:
    """Along `dim`, whether all values can be scaled and lose nothing to subnormals or overflow: bool."""
    kept = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
    step = max(1, _BLOCK_VALUES // max(1, tensor.numel() // tensor.shape[0]))
    for start in range(0, tensor.shape[0], step):
        rows = slice(start, start + step)
        block, chosen = tensor[rows], exponents[rows] if dim == 0 else exponents
        there = block * _along(block, dim, chosen)
        exact = (there * _along(block, dim, -chosen) == block) & there.isfinite()
        if dim == 0:
            kept[rows] = exact.flatten(1).all(1) if exact.ndim > 1 else exact
        else:
            kept &= exact.all(0)
    return kept


def _along(tensor: Tensor, dim: int, exponents: Tensor) -> Tensor:
    """2^exponents in the dtype of `tensor`, in a shape to multiply it by along `dim`."""
    factors = powers_of_two(exponents.to(tensor.device)).to(tensor.dtype)
    return factors.view(-1, *[1] * (tensor.ndim - 1 - dim))


def encode_exponents(exponents: Tensor) -> str:
    """int8 `[P]` as a line of text for job.json: base64 of the bytes."""
    return base64.b64encode(exponents.cpu().numpy().tobytes()).decode("ascii")


def decode_exponents(text: str) -> Tensor:
    """What `encode_exponents` was given; raises ValueError for any other text."""
    exponents = torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), np.int8).copy())
    if len(exponents) and int(exponents.abs().max()) > MOST:
        raise ValueError(f"an exponent beyond ±{MOST}")
    return exponents
