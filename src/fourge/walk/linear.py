"""A Linear as a lane holds it: the weight stays in its stored form and is widened a block of rows at a time.

That is what keeps the walk's memory at one layer in the source's own dtype: an FP32 copy of a whole layer would be
two layers more. The sum over K is never split, so the blocks change nothing but where the output is written. On a GPU
they are large, for a small product leaves most of it idle; a weight that is stored as it is multiplied is in no blocks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fourge.nvfp4.fp8 import Fp8Weight, dequantize_rows
from fourge.nvfp4.quantize import QuantizedWeight, dequantize_weight, fake_quantize

ROWS_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
"""Of a weight, widened at a time, by the kind of device."""


Rounding = Callable[[Tensor], Tensor]
"""What an engine makes of activations `[..., K]` before it multiplies them, in their dtype."""


def to_nvfp4(global_scale: Tensor | None) -> Rounding | None:
    """Dynamic rounding to NVFP4 under `global_scale` (FP32 divisor, `[1]`); None for None."""
    return None if global_scale is None else partial(fake_quantize, global_scale=global_scale)


class InputSite:
    """The input that the Linears of a group share: rounded in the nvfp4 lane, seen by an observer, once for all.

    `round_input` is what the engine does with the activations; `observe` is called with the input `[..., K]` as it
    is multiplied.
    """

    def __init__(self, round_input: Rounding | None = None, observe: Callable[[Tensor], None] | None = None) -> None:
        self.round_input = round_input
        self.observe = observe
        self._seen: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._seen is None or self._seen[0] is not x:
            multiplied = x if self.round_input is None else self.round_input(x)
            if self.observe is not None:
                self.observe(multiplied)
            self._seen = (x, multiplied)
        return self._seen[1]

    def forget(self) -> None:
        """Lets go of the last input, which is otherwise kept for the next member of the group."""
        self._seen = None


class LaneLinear(nn.Module):
    """`y = site(x) Wᵀ + b` in `x`'s dtype, for W `[N, K]` stored as a float tensor, in NVFP4 or in FP8."""

    def __init__(self, weight: Tensor | QuantizedWeight | Fp8Weight, bias: Tensor | None, site: InputSite) -> None:
        super().__init__()
        self.stored = weight
        self.bias = bias
        self.site = site

    def widen(self, dtype: torch.dtype) -> None:
        """Stores the weight as a tensor of `dtype`, with the values that it is computed with."""
        self.stored = self._rows(slice(None), dtype)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        if isinstance(self.stored, QuantizedWeight):
            return dequantize_weight(self.stored, rows, dtype)
        if isinstance(self.stored, Fp8Weight):
            return dequantize_rows(self.stored, rows, dtype)
        return self.stored[rows].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(x)
        out_features, in_features = self.stored.shape
        step: int = max(1, ROWS_BYTES[x.device.type] // (in_features * x.element_size()))
        if step >= out_features or (isinstance(self.stored, Tensor) and self.stored.dtype == x.dtype):
            return nn.functional.linear(x, self._rows(slice(None), x.dtype), self.bias)
        y = x.new_empty(*x.shape[:-1], out_features)
        inputs, outputs = x.reshape(-1, in_features), y.view(-1, out_features)
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            weight, out = self._rows(rows, x.dtype).T, outputs[:, rows]
            if self.bias is None:
                torch.mm(inputs, weight, out=out)
            else:
                torch.addmm(self.bias[rows], inputs, weight, out=out)
        return y
