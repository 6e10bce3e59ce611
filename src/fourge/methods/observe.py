"""What calibration sees of the input that a group of Linears shares, and the input's global scale from it."""

import torch
from torch import Tensor

from fourge.nvfp4.quantize import global_scale


class InputStatistics:
    """Running statistics of an input `[..., K]`: the largest magnitude and the number of tokens."""

    def __init__(self) -> None:
        self.amax = torch.zeros((), dtype=torch.float32)
        self.tokens = 0

    def observe(self, x: Tensor) -> None:
        """Takes a micro-batch of inputs."""
        self.amax = torch.maximum(self.amax, x.abs().amax().float().cpu())
        self.tokens += x.numel() // x.shape[-1]


def input_global_scale(statistics: InputStatistics, headroom: float) -> Tensor:
    """The activations' divisor, FP32 `[1]`: `448 · 6 / (headroom · amax)`.

    A token beyond the calibrated range saturates, which hurts at once, while a range twice too wide costs next to
    nothing: group scales are floating point, so only the smallest groups move towards E4M3's subnormals.
    """
    return global_scale(statistics.amax * headroom).reshape(1)
