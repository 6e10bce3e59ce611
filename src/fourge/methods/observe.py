"""What calibration sees of the input that a group of Linears shares, and the input's global scale from it."""

import torch
from torch import Tensor

from fourge.methods.hessian import HessianAccumulator
from fourge.nvfp4.quantize import amax, global_scale


class InputStatistics:
    """Running statistics of an input `[..., K]`.

    `amax`: the largest magnitude, `importance`: diag(XᵀX) `[K]` where asked for, `tokens`: how many there were, all
    three of the source model's activations. `hessian`: XᵀX of what the quantized Linears will see, where the method
    needs it.
    """

    def __init__(self, *, weigh_channels: bool = False) -> None:
        self.amax = torch.zeros((), dtype=torch.float32)
        self.importance: Tensor | None = None
        self.tokens = 0
        self.hessian: HessianAccumulator | None = None
        self._weigh_channels = weigh_channels

    def observe(self, x: Tensor) -> None:
        """Takes a micro-batch of inputs."""
        self.add(self.summarise(x))
        self.tokens += x.numel() // x.shape[-1]

    def summarise(self, x: Tensor) -> Tensor:
        """What is to be known of a micro-batch, FP32 on its device: the largest magnitude, then Σ x² by channel."""
        summary = amax(x).reshape(1)
        if self._weigh_channels:
            summary = torch.cat((summary, x.reshape(-1, x.shape[-1]).float().square().sum(0)))
        return summary

    def add(self, summary: Tensor) -> None:
        """Takes the summary of the next micro-batch, whose `tokens` the caller counts. The order decides last bits."""
        self.amax = torch.maximum(self.amax.to(summary.device), summary[0])  # stays there, so that nobody waits for it
        if self._weigh_channels:
            self.importance = summary[1:] if self.importance is None else self.importance + summary[1:]


def input_global_scale(statistics: InputStatistics, headroom: float) -> Tensor:
    """The activations' divisor, FP32 `[1]`: `448 · 6 / (headroom · amax)`.

    A token beyond the calibrated range saturates, which hurts at once, while a range twice too wide costs next to
    nothing: group scales are floating point, so only the smallest groups move towards E4M3's subnormals.
    """
    return global_scale(statistics.amax * headroom).reshape(1)
