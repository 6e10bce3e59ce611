"""Power-of-two smoothing: the exponents that share quantization's difficulty between a group's input and its weights.

x' = x · 2^−k and W' = W · 2^k, channel by channel, multiply to the very same numbers, so k is free; NVFP4 rounds x'
and W' instead of x and W. Loud channels made quieter spare their neighbours in the activations, and the weights pay
for it. Tried is s = (rms(x) / mean)^a / (max|w| / mean)^b over a few (a, b), rounded to powers of two as
SmoothQuant's (arXiv 2211.10438) scales are not; minimised is the error of the Linears' output with both sides rounded.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourge.methods.scale_search import search_scales
from fourge.nvfp4.quantize import amax, dequantize_weight, fake_quantize, global_scale, quantize_weight

POWERS = ((0.0, 0.0), *((a, b) for a in (0.25, 0.5, 0.75) for b in (0.0, 0.25, 0.5)))
"""The (a, b) that are tried; the first changes nothing, and the first of equals stays."""

MOST = 8
"""No exponent is larger than this, up or down."""


@dataclass(frozen=True)
class Tie:
    """Which channels of the tensor that feeds a group become which input channels of it.

    `heads` key-value heads, each read by `repeats` query heads, in the order of grouped-query attention; everywhere
    else one channel is one channel, which is one head and no repeats.
    """

    heads: int = 1
    repeats: int = 1

    def to_inputs(self, channels: Tensor) -> Tensor:
        """Values of the feeding channels `[P]` for the input channels, `[K]`, K = repeats · P."""
        return channels.view(self.heads, 1, -1).expand(-1, self.repeats, -1).reshape(-1)

    def by_channel(self, inputs: Tensor) -> Tensor:
        """Values of the input channels `[K]` by feeding channel, `[P, repeats]`."""
        return inputs.view(self.heads, self.repeats, -1).transpose(1, 2).reshape(-1, self.repeats)


@dataclass(frozen=True)
class Rounding:
    """What is rounded, and how: weights under max scales or `searched` ones, inputs too or weights alone."""

    searched: bool
    inputs: bool
    headroom: float


@dataclass(frozen=True)
class Sample:
    """What exponents are judged on: some inputs `[T, K]` of a group and some rows of its Linears, `[n, K]` each.

    `largest` FP32 `[K]`: the largest magnitude in each column of the whole weights.
    """

    inputs: Tensor
    weights: Sequence[Tensor]
    largest: Tensor


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^k, FP32, for integers k from −126 to 127: exact, which a library's exp2 need not be."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def exponents_for(sample: Sample, powers: tuple[float, float], tie: Tie) -> Tensor:
    """k for the feeding channels, int8 `[P]`: log₂ of s, rounded. Channels without input or weights get 0.

    Every token counts the same in rms(x), whatever its norm: the first of a sequence would drown the others.
    """
    mean_squares = _evened(sample.inputs).square().mean(0)
    loud = tie.by_channel(mean_squares).mean(1).sqrt()
    large = tie.by_channel(sample.largest).amax(1)
    a, b = powers
    shares = a * torch.log2(loud / loud.mean()) - b * torch.log2(large / large.mean())
    return torch.where((loud > 0) & (large > 0), shares, 0.0).round().clamp(-MOST, MOST).to(torch.int8)


def output_error(sample: Sample, exponents: Tensor, rounding: Rounding) -> float:
    """Relative error of the output with exponents `[K]` folded in: ‖Y' − Y‖ / ‖Y‖, Y = X Wᵀ.

    Tokens count the same whatever their norm, and so do the group's Linears: the mean of their squares is taken.
    """
    up = powers_of_two(exponents)
    down = powers_of_two(-exponents)
    x = sample.inputs.float()
    folded = x * down
    rounded = fake_quantize(folded, global_scale(amax(folded) * rounding.headroom)) if rounding.inputs else folded
    divisor = global_scale((sample.largest * up).max())
    importance = folded.square().sum(0) if rounding.searched else None
    evened, evened_rounded = _evened(x, folded), _evened(x, rounded)
    squares = []
    for rows in sample.weights:
        weight = rows.float() * up
        scales = search_scales(weight, divisor, importance) if rounding.searched else None
        stored = dequantize_weight(quantize_weight(weight, divisor, scales))
        output = evened @ weight.T
        error = evened_rounded @ stored.T - output
        power = output.square().sum(dtype=torch.float64)
        # A dead Linear has no output to err in.
        squares.append(float(error.square().sum(dtype=torch.float64) / power) if power else 0.0)
    return math.sqrt(sum(squares) / len(squares))


Each = Callable[[Callable[[Tensor], float], Sequence[Tensor]], Iterable[float]]
"""As `map`: a function of every value, in their order, wherever it is computed."""


def choose(sample: Sample, tie: Tie, rounding: Rounding, each: Each = map) -> tuple[tuple[float, float], Tensor]:
    """The powers (a, b) among `POWERS` of the least output error on `sample`, and their exponents, int8 `[P]`."""
    tried = [(powers, exponents_for(sample, powers, tie)) for powers in POWERS]
    inputs = [tie.to_inputs(exponents) for _, exponents in tried]
    errors = list(each(lambda exponents: output_error(sample, exponents, rounding), inputs))
    return tried[errors.index(min(errors))]


def _evened(inputs: Tensor, rows: Tensor | None = None) -> Tensor:
    """`rows` `[T, K]` (`inputs` themselves without), each over the norm of its row of `inputs`; zero rows stay."""
    norms = inputs.float().norm(dim=1, keepdim=True)
    evened: Tensor = (inputs.float() if rows is None else rows) / norms.masked_fill_(norms == 0, 1.0)
    return evened
