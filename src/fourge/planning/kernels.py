"""Which of vLLM's NVFP4 kernels a GPU gets, and what that does to accuracy and speed."""

from dataclasses import dataclass

from fourge.planning.hardware import Gpu
from fourge.settings import Scheme

_FP4_FAMILIES = (10, 12)
"""Compute capability majors with FP4 tensor cores that the kernels are built for: SM100, SM103, SM120, SM121."""
_MARLIN_FROM = 75
_NO_BF16_BELOW = 80


@dataclass(frozen=True)
class Kernel:
    """`activations_quantized`: whether the Linears' inputs are rounded to NVFP4 too (W4A4) or not (W4A16)."""

    name: str
    activations_quantized: bool
    accuracy: str
    speed: str


FP4 = Kernel(
    name="FP4 tensor cores",
    activations_quantized=True,
    accuracy="W4A4, weights and activations rounded to NVFP4: what verify and evaluate measure",
    speed="multiplies in FP4, at four to eight times BF16's peak; decode reads little over a quarter of BF16's bytes",
)
MARLIN = Kernel(
    name="Marlin",
    activations_quantized=False,
    accuracy="W4A16, weight-only: activations stay as they are, so a score taken here is none of W4A4",
    speed="widens weights on the fly and multiplies in 16 bits: decode gains as with FP4, prefill does not",
)
MARLIN_WITHOUT_BF16 = Kernel(
    name="Marlin in FP16",
    activations_quantized=False,
    accuracy="W4A16 with activations in FP16 (--dtype half: no BF16 before SM80), which overflow sooner than BF16",
    speed=MARLIN.speed,
)
EMULATION = Kernel(
    name="emulation",
    activations_quantized=True,
    accuracy="W4A4's numbers, emulated: weights and activations are rounded, then multiplied in BF16",
    speed="weights are widened to BF16 in memory at every step: slower than the BF16 model; it saves memory only",
)
KERNELS = (FP4, MARLIN, MARLIN_WITHOUT_BF16, EMULATION)


def choose_kernel(gpu: Gpu, scheme: Scheme) -> Kernel | None:
    """vLLM's own choice for `scheme` on `gpu`; None where it has no kernel at all.

    Weight-only checkpoints (NVFP4A16) have no scales for the activations, so they get Marlin on Blackwell too.
    """
    if gpu.sm is None:
        return EMULATION
    if gpu.sm // 10 in _FP4_FAMILIES and scheme == "NVFP4":
        return FP4
    if gpu.sm >= _NO_BF16_BELOW:
        return MARLIN
    return MARLIN_WITHOUT_BF16 if gpu.sm >= _MARLIN_FROM else None
