"""The NVFP4 kernel that the CPU plugin gives to vLLM: weights dequantized once, activations at every forward.

Only a vLLM environment can import this module. The arithmetic is `fourge.nvfp4`'s own, so that vLLM computes what
our lane computes, up to the dtype of its matrix products. Dequantized weights take as much memory as the source's.
"""

import os
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels import linear
from vllm.platforms import PlatformEnum

from fourge.nvfp4.quantize import QuantizedWeight, dequantize_weight, fake_quantize
from fourge.serving.vllm_cpu import chosen_mode, quantizes_activations


@torch.library.custom_op("fourge::nvfp4_input", mutates_args=())
def nvfp4_input(x: Tensor, global_scale: Tensor) -> Tensor:
    """`fake_quantize` as one opaque operator: vLLM's compiler must not unroll its loop for one number of tokens."""
    return fake_quantize(x, global_scale)


@nvfp4_input.register_fake
def _(x: Tensor, global_scale: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class FourgeCpuNvFp4LinearKernel(linear.NvFp4LinearKernel):  # type: ignore[misc]
    """One kernel for both schemes: a layer without an input scale is a weight-only one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mode = chosen_mode(os.environ)

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """vLLM's question whether this machine will do; any CPU does."""
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """vLLM's question about a layer; its config has no fields, all NVFP4 layers are alike."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Puts `[N, K]` in the compute dtype where the codes were.

        Both layouts arrive alike here: `weight` uint8 `[N, K/2]`, `weight_scale` E4M3 `[N, K/16]`,
        `weight_global_scale` FP32 `[]`, a multiplier, and for W4A4 `input_global_scale_inv` FP32 `[]`, a divisor.
        """
        layer.quantizes_input = quantizes_activations(self.mode, hasattr(layer, "input_global_scale_inv"))
        stored = QuantizedWeight(
            layer.weight.data, layer.weight_scale.data, layer.weight_global_scale.data.reciprocal().reshape(1)
        )
        dense = dequantize_weight(stored, dtype=layer.params_dtype)
        layer.weight = torch.nn.Parameter(dense, requires_grad=False)
        del layer.weight_scale

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[…, K]` to `[…, N]`, both in the compute dtype."""
        if layer.quantizes_input:
            x = nvfp4_input(x, layer.input_global_scale_inv)
        return torch.nn.functional.linear(x, layer.weight, bias)


def offer_to_vllm() -> None:
    """Makes vLLM 0.32 choose our kernel for every NVFP4 Linear on the CPU.

    W4A4 layers are selected from what is registered. For weight-only layers vLLM does not select: it takes the
    class that its module calls `MarlinNvFp4LinearKernel`, which no CPU can run, so that name is made to mean ours.
    """
    if linear.MarlinNvFp4LinearKernel is not FourgeCpuNvFp4LinearKernel:
        linear.register_linear_kernel(FourgeCpuNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
        linear.MarlinNvFp4LinearKernel = FourgeCpuNvFp4LinearKernel
