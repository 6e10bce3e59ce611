"""Model-Optimizer's NVFP4 kernels in torch, for machines without a GPU: it has them in Triton and CUDA only.

Same order of operations in FP32, ties to even; without them its `mse`, `local_hessian` and `gptq` stop on a CPU.
"""

import math

import modelopt.torch.quantization.tensor_quant as tensor_quant
import torch
from torch import Tensor

E4M3_MAX, E2M1_MAX = 448.0, 6.0
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# A value on a bound goes down: where the tie goes up, the bound is the number just below it.
BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
BOUNDS[1::2] = torch.nextafter(BOUNDS[1::2], torch.tensor(0.0))


def round_to_grid(x: Tensor, scale: Tensor) -> Tensor:
    """FP32 `x`, each value the nearest multiple in E2M1 of the `scale` that belongs to it; 0 where that is 0."""
    usable = torch.where((scale == 0) | ~scale.isfinite(), 1.0, scale)
    rounded = MAGNITUDES[torch.bucketize(x.abs() / usable, BOUNDS)].copysign(x) * usable
    return torch.where(scale == 0, 0.0, rounded)


def static_blockwise_fp4_fake_quant(
    x: Tensor,
    amax: Tensor,
    global_amax: Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = E4M3_MAX,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x` quantized and back under the given range of every block, in the order of the blocks in memory."""
    scale = amax.float() / E2M1_MAX
    if quantize_block_scales:
        whole = (amax.float().max() if global_amax is None else global_amax.float()) / E2M1_MAX
        scale = tensor_quant.scaled_e4m3_impl(scale, whole * (E4M3_MAX / fp8_max_for_normalization))
    blocks = x.float().reshape(scale.numel(), -1)
    return round_to_grid(blocks, scale.reshape(-1, 1)).to(out_dtype or x.dtype).view(x.shape)


def dynamic_block_quantize(x: Tensor, block_size: int, amax: Tensor | None, *formats: int) -> Tensor:
    """`x` quantized and back, the range of every block taken from it, that of the whole given by `amax`."""
    assert formats == (4, 2, 8, 4), f"bits and exponent bits of values and scales {formats} are not NVFP4's"
    whole = (x.abs().max() if amax is None else amax.max()).float() / (E2M1_MAX * E4M3_MAX)
    whole = torch.where(whole > 0, whole, 1e-12)
    blocks = x.float().reshape(math.prod(x.shape) // block_size, block_size)
    scale = (blocks.abs().amax(1, keepdim=True) / (E2M1_MAX * whole)).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float() * whole
    scale = torch.where(scale >= 1e-5, scale, 1.0)
    return round_to_grid(blocks, scale).to(x.dtype).view(x.shape)


def install() -> None:
    """Puts these functions where Model-Optimizer looks for its kernels."""
    kernels = tensor_quant.triton_kernel
    kernels.static_blockwise_fp4_fake_quant = static_blockwise_fp4_fake_quant
    kernels.IS_AVAILABLE = True
    tensor_quant.dynamic_block_quantize_op = dynamic_block_quantize
