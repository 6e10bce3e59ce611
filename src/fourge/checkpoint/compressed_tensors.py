"""The contract with the engines: tensor names of a quantized Linear and the `quantization_config` of config.json.

The config is written out key by key rather than dumped from the installed library, so that the bytes do not depend
on its version and the oldest reader in the field (0.17, pinned by vLLM 0.33) parses it: unknown keys inside a
group are rejected there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fourge.nvfp4.quantize import GROUP_SIZE, QuantizedWeight
from fourge.settings import KvCacheScheme, Scheme

FORMAT = "nvfp4-pack-quantized"
FORMAT_VERSION = "0.20.0"
"""The compressed-tensors release whose fields these are."""

COLUMNS_PER_RANK_MULTIPLE = 32
"""K per tensor-parallel rank must be a multiple of this for the engines' FP4 kernels."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A Linear as it goes into the file; `input_global_scale` is FP32 `[1]`, None for weight-only."""

    weight: QuantizedWeight
    input_global_scale: Tensor | None


@dataclass(frozen=True)
class KvScales:
    """A layer's scales of the KV cache, both FP32 `[1]`: multipliers, `x ≈ e4m3 · scale`."""

    k: Tensor
    v: Tensor


def tensor_names(linear: str, scheme: Scheme) -> tuple[str, ...]:
    """The tensors that replace `linear`.weight, in the order of `format.md`'s table."""
    names = ["weight_packed", "weight_scale", "weight_global_scale"]
    if scheme == "NVFP4":
        names.append("input_global_scale")
    return tuple(f"{linear}.{name}" for name in names)


def tensor_specs(linear: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (safetensors dtype, shape) of those tensors for a weight of `shape` `[N, K]`."""
    rows, columns = shape
    specs = {
        "weight_packed": ("U8", (rows, columns // 2)),
        "weight_scale": ("F8_E4M3", (rows, columns // GROUP_SIZE)),
        "weight_global_scale": ("F32", (1,)),
        "input_global_scale": ("F32", (1,)),
    }
    return {name: specs[name.rpartition(".")[2]] for name in tensor_names(linear, scheme)}


def tensors(linear: str, quantized: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors to write for `linear`."""
    entries = {
        f"{linear}.weight_packed": quantized.weight.packed,
        f"{linear}.weight_scale": quantized.weight.scale,
        f"{linear}.weight_global_scale": quantized.weight.global_scale,
    }
    if quantized.input_global_scale is not None:
        entries[f"{linear}.input_global_scale"] = quantized.input_global_scale
    return entries


def kv_scale_specs(attention: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (safetensors dtype, shape) of what an FP8 KV cache adds to the module `attention`.

    FP32, as engines hold them and NVIDIA writes them. llm-compressor stores the model's own dtype, and so rounds.
    """
    return {f"{attention}.k_scale": ("F32", (1,)), f"{attention}.v_scale": ("F32", (1,))}


def kv_scale_tensors(attention: str, scales: KvScales) -> dict[str, Tensor]:
    """The tensors of `kv_scale_specs`."""
    return {f"{attention}.k_scale": scales.k, f"{attention}.v_scale": scales.v}


KV_CACHE_FP8: Mapping[str, Any] = {
    "dynamic": False,
    "num_bits": 8,
    "strategy": "tensor",
    "symmetric": True,
    "type": "float",
}
"""`kv_cache_scheme` of an FP8 cache with one calibrated scale a tensor; engines look at each of these keys."""


def _arguments(**own: Any) -> dict[str, Any]:
    return {
        "group_size": GROUP_SIZE,
        "num_bits": 4,
        "scale_dtype": "torch.float8_e4m3fn",
        "strategy": "tensor_group",
        "symmetric": True,
        "type": "float",
    } | own


def quantization_config(scheme: Scheme, ignore: Iterable[str], kv_cache_scheme: KvCacheScheme | None) -> dict[str, Any]:
    """`quantization_config` for one group of Linears; `ignore` names every Linear that stays as it is."""
    group: dict[str, Any] = {
        "format": FORMAT,
        "input_activations": _arguments(dynamic="local", observer="static_minmax") if scheme == "NVFP4" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _arguments(dynamic=False),
    }
    return {
        "config_groups": {"group_0": group},
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None if kv_cache_scheme is None else dict(KV_CACHE_FP8),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": FORMAT_VERSION,
    }


def with_quantization(
    config: Mapping[str, Any], scheme: Scheme, ignore: Iterable[str], kv_cache_scheme: KvCacheScheme | None
) -> dict[str, Any]:
    """The source's `config.json` with `quantization_config` added and nothing else changed."""
    return {**config, "quantization_config": quantization_config(scheme, ignore, kv_cache_scheme)}
