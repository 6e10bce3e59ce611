"""The contract with the engines: tensor names of a quantized Linear and the `quantization_config` of config.json.

The config is written out key by key rather than dumped from the installed library, so that the bytes do not depend
on its version and the oldest reader in the field (0.17, pinned by vLLM 0.33) parses it: unknown keys inside a
group are rejected there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from fourge.nvfp4.fp8 import Fp8Weight
from fourge.nvfp4.quantize import GROUP_SIZE, QuantizedWeight
from fourge.settings import KvCacheScheme, LinearScheme

FORMAT = "nvfp4-pack-quantized"
FP8_FORMAT = "float-quantized"
MIXED_FORMAT = "mixed-precision"
FORMAT_VERSION = "0.20.0"
"""The compressed-tensors release whose fields these are."""

COLUMNS_PER_RANK_MULTIPLE = 32
"""K per tensor-parallel rank must be a multiple of this for the engines' FP4 kernels."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A Linear as it goes into the file; `input_global_scale` is FP32 `[1]`, None for weight-only and for FP8."""

    weight: QuantizedWeight | Fp8Weight
    input_global_scale: Tensor | None


@dataclass(frozen=True)
class KvScales:
    """A layer's scales of the KV cache, both FP32 `[1]`: multipliers, `x ≈ e4m3 · scale`."""

    k: Tensor
    v: Tensor


WEIGHT_PARTS: Mapping[LinearScheme, tuple[str, ...]] = {
    "NVFP4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "NVFP4A16": ("weight_packed", "weight_scale", "weight_global_scale"),
    "FP8": ("weight", "weight_scale"),
}
"""The tensors that hold a Linear's weight, without its name."""


def tensor_specs(
    linear: str, shape: tuple[int, int], scheme: LinearScheme, dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (safetensors dtype, shape) of the tensors that stand for a weight of `shape` `[N, K]` and `dtype`."""
    rows, columns = shape
    if scheme == "FP8":
        return {f"{linear}.weight": ("F8_E4M3", shape), f"{linear}.weight_scale": (dtype, (rows, 1))}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{linear}.weight_packed": ("U8", (rows, columns // 2)),
        f"{linear}.weight_scale": ("F8_E4M3", (rows, columns // GROUP_SIZE)),
        f"{linear}.weight_global_scale": ("F32", (1,)),
    }
    if scheme == "NVFP4":
        specs[f"{linear}.input_global_scale"] = ("F32", (1,))
    return specs


def tensors(linear: str, quantized: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors to write for `linear`."""
    if isinstance(quantized.weight, Fp8Weight):
        return {f"{linear}.weight": quantized.weight.codes, f"{linear}.weight_scale": quantized.weight.scale}
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


def _fp8_arguments(**own: Any) -> dict[str, Any]:
    return {"group_size": None, "num_bits": 8, "symmetric": True, "type": "float"} | own


def _group(scheme: LinearScheme, targets: Sequence[str]) -> dict[str, Any]:
    inputs: dict[str, Any] | None = None
    if scheme == "FP8":
        inputs = _fp8_arguments(dynamic=True, strategy="token")
    elif scheme == "NVFP4":
        inputs = _arguments(dynamic="local", observer="static_minmax")
    return {
        "format": FP8_FORMAT if scheme == "FP8" else FORMAT,
        "input_activations": inputs,
        "output_activations": None,
        "targets": list(targets),
        "weights": _fp8_arguments(dynamic=False, strategy="channel") if scheme == "FP8" else _arguments(dynamic=False),
    }


def one_format(formats: Iterable[Any]) -> Any:
    """The `format` of a config whose groups have these: theirs, where they have one."""
    first, *others = dict.fromkeys(formats)
    return MIXED_FORMAT if others else first


def quantization_config(
    scheme: LinearScheme, ignore: Iterable[str], kv_cache_scheme: KvCacheScheme | None
) -> dict[str, Any]:
    """`quantization_config` for one group of Linears; `ignore` names every Linear that stays as it is."""
    return _config([_group(scheme, ["Linear"])], ignore, kv_cache_scheme)


def _config(
    groups: Sequence[dict[str, Any]], ignore: Iterable[str], kv_cache_scheme: KvCacheScheme | None
) -> dict[str, Any]:
    return {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "format": one_format(group["format"] for group in groups),
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
    config: Mapping[str, Any],
    schemes: Mapping[str, LinearScheme],
    ignore: Iterable[str],
    kv_cache_scheme: KvCacheScheme | None,
) -> dict[str, Any]:
    """The source's `config.json` with `quantization_config` added and nothing else changed; `schemes` by Linear.

    The groups of a mixture name every Linear: engines join q/k/v into one module, whose class they match before they
    look at the names of its parts, so that a class among the targets would take Linears of the other group.
    """
    targets: dict[LinearScheme, list[str]] = {}
    for linear, scheme in schemes.items():
        targets.setdefault(scheme, []).append(linear)
    if len(targets) == 1:
        (only,) = targets
        return {**config, "quantization_config": quantization_config(only, ignore, kv_cache_scheme)}
    groups = [_group(scheme, targets[scheme]) for scheme in get_args(LinearScheme) if scheme in targets]
    return {**config, "quantization_config": _config(groups, ignore, kv_cache_scheme)}
