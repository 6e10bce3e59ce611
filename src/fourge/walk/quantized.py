"""A quantized directory as the nvfp4 lane reads it, a decoder layer at a time."""

from dataclasses import dataclass

from torch import Tensor

from fourge.checkpoint.compressed_tensors import QuantizedLinear
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.reader import Checkpoint
from fourge.nvfp4.fp8 import Fp8Weight
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.progress import WalkProgress
from fourge.settings import KvCacheScheme
from fourge.walk.ahead import read_tensor
from fourge.walk.kv_cache import read_kv_scales
from fourge.walk.lanes import quantized_layer
from fourge.walk.layer import LaneLayer
from fourge.walk.walk import Walk


@dataclass(frozen=True)
class QuantizedModel:
    """An open checkpoint, its Linears stored as `layout.schemes` says, its keys and values in `kv_cache_scheme`.

    Without `rounds_fp4_inputs`, what is multiplied by a weight in NVFP4 stays as it is: so on GPUs without FP4.
    """

    checkpoint: Checkpoint
    layout: Layout
    kv_cache_scheme: KvCacheScheme | None
    rounds_fp4_inputs: bool = True

    def layer(self, walk: Walk, layer: int, progress: WalkProgress) -> LaneLayer:
        """Reads a layer and builds it for `walk`'s skeleton, device and dtype; to be used in a `with`."""
        prefix = self.layout.architecture.layer_prefix(layer)
        before = self.checkpoint.bytes_read
        kept: dict[str, Tensor] = {}
        linears: dict[str, QuantizedLinear] = {}
        for name in self.layout.steps[layer + 1]:
            linear = name.removesuffix(".weight")
            if linear in self.layout.quantized:
                linears[linear.removeprefix(prefix)] = self._read_linear(walk, linear)
            else:
                kept[name.removeprefix(prefix)] = self._read(walk, name)
        kv_scales = None
        if self.kv_cache_scheme is not None:
            kv_scales = read_kv_scales(self.checkpoint, self.layout.attention(layer), walk.device)
        progress.advance(0.0, read=self.checkpoint.bytes_read - before)
        return quantized_layer(walk, self.layout, layer, kept, linears, kv_scales=kv_scales)

    def _read(self, walk: Walk, name: str) -> Tensor:
        return read_tensor(self.checkpoint, name, walk.device)

    def _read_linear(self, walk: Walk, linear: str) -> QuantizedLinear:
        scheme = self.layout.schemes[linear]
        if scheme == "FP8":
            codes, scale = (self._read(walk, f"{linear}.{part}") for part in ("weight", "weight_scale"))
            return QuantizedLinear(Fp8Weight(codes, scale), None)
        weight = QuantizedWeight(
            self._read(walk, f"{linear}.weight_packed"),
            self._read(walk, f"{linear}.weight_scale"),
            self._read(walk, f"{linear}.weight_global_scale"),
        )
        rounds = scheme == "NVFP4" and self.rounds_fp4_inputs
        return QuantizedLinear(weight, self._read(walk, f"{linear}.input_global_scale") if rounds else None)
