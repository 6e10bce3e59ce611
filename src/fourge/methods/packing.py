"""From rounded values to a checkpoint's tensors."""

from torch import Tensor

from fourge.nvfp4 import e2m1, e4m3
from fourge.nvfp4.quantize import QuantizedWeight


def pack_values(values: Tensor, scales: Tensor, global_scale: Tensor) -> QuantizedWeight:
    """`values` `[N, K]` on the E2M1 grid under `scales` `[N, K/16]` on the E4M3 grid and the divisor `global_scale`."""
    packed = e2m1.pack(e2m1.encode(values))
    return QuantizedWeight(packed, e4m3.encode(scales), global_scale.reshape(1))
