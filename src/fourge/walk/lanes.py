"""A decoder layer as each lane runs it: the source's tensors for one, quantized Linears among them for the others."""

from collections.abc import Mapping

from torch import Tensor

from fourge.checkpoint.compressed_tensors import KvScales, QuantizedLinear
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.reader import require_finite
from fourge.nvfp4.fp8 import Fp8Weight, fake_quantize_tokens
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.progress import WalkProgress
from fourge.walk.ahead import read_tensor
from fourge.walk.kv_cache import Fp8KvCache
from fourge.walk.layer import LaneLayer, StoredWeights
from fourge.walk.linear import InputSite, Rounding, to_nvfp4
from fourge.walk.walk import Walk

LayerWeights = dict[str, Tensor | QuantizedWeight]
"""A layer's tensors by name relative to it."""


def read_layer(walk: Walk, layout: Layout, layer: int, progress: WalkProgress) -> LayerWeights:
    """A layer's tensors as the source stores them, by name relative to it; InputError for NaN and Inf."""
    prefix = layout.architecture.layer_prefix(layer)
    weights: LayerWeights = {}
    for name in layout.steps[layer + 1]:
        info = walk.source.tensors[name]
        tensor = read_tensor(walk.source, name, walk.device)
        require_finite(tensor, info)
        weights[name.removeprefix(prefix)] = tensor
        progress.advance(0.0, read=info.nbytes)
    return weights


def quantized_layer(
    walk: Walk,
    layout: Layout,
    layer: int,
    kept: Mapping[str, Tensor | QuantizedWeight],
    linears: Mapping[str, QuantizedLinear],
    sites: Mapping[str, InputSite] | None = None,
    kv_scales: KvScales | None = None,
    *,
    rounds_inputs: bool = True,
) -> LaneLayer:
    """The layer as engines run it: quantized weights, inputs rounded as the group's scheme has it.

    Without `rounds_inputs`, as weight-only engines do.

    `kept` are the layer's other tensors and `linears` its quantized ones, both by name relative to the layer;
    groups of which no Linear is in `linears` stay as they are, or get the site that `sites` names for them. With
    `kv_scales`, attention reads keys and values from an FP8 cache.
    """
    weights: StoredWeights = {**kept, **{f"{name}.weight": linear.weight for name, linear in linears.items()}}
    all_sites = dict(sites or {})
    for group in layout.groups(layer):
        if group.linears[0] in linears:
            rounding = _rounding(linears[group.linears[0]], walk) if rounds_inputs else None
            all_sites[group.name] = InputSite(rounding)
    kv_cache = None if kv_scales is None else Fp8KvCache(kv_scales, walk.device)
    return LaneLayer(walk.skeleton, layer, weights, walk.dtype, all_sites, kv_cache)


def _rounding(linear: QuantizedLinear, walk: Walk) -> Rounding | None:
    if isinstance(linear.weight, Fp8Weight):
        return fake_quantize_tokens
    scale = linear.input_global_scale
    return to_nvfp4(None if scale is None else scale.to(walk.device))
