"""NVIDIA's layout of an NVFP4 checkpoint, as Model-Optimizer exports it and TensorRT-LLM reads it.

Packed codes and group scales are the bytes of compressed-tensors under other names. The global scales are
multipliers there, and divisors everywhere else in this package: only this file knows the reciprocal. Read from
Model-Optimizer 0.47, whose own export on the same model the slow tests hold against this.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourge.errors import InputError
from fourge.nvfp4.quantize import GROUP_SIZE
from fourge.settings import KvCacheScheme, Scheme

HF_QUANT_CONFIG = "hf_quant_config.json"
"""What is quantized and how; the same is said, in other words, in `quantization_config` of `config.json`."""

ALGORITHMS: Mapping[Scheme, str] = {"NVFP4": "NVFP4", "NVFP4A16": "W4A16_NVFP4"}
"""`quant_algo` of the schemes."""

_KV_CACHE_ALGORITHM = "FP8"
"""`kv_cache_quant_algo` of `--kv-cache-scheme fp8`: one static scale a tensor, a multiplier here as there."""

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Engines read the layout from a producer of this name only; the version is the release whose fields these are."""

_KV_CACHE_ARGUMENTS = {"dynamic": False, "num_bits": 8, "type": "float"}

_METHOD = "modelopt"


def hf_quant_config(scheme: Scheme, exclude: Sequence[str], kv_cache_scheme: KvCacheScheme | None) -> dict[str, Any]:
    """The content of `hf_quant_config.json`; `exclude` names every module with a matrix that is not quantized."""
    return {
        "producer": dict(_PRODUCER),
        "quantization": {
            "quant_algo": ALGORITHMS[scheme],
            "kv_cache_quant_algo": None if kv_cache_scheme is None else _KV_CACHE_ALGORITHM,
            "group_size": GROUP_SIZE,
            "exclude_modules": list(exclude),
        },
    }


def quantization_config(
    scheme: Scheme, exclude: Sequence[str], kv_cache_scheme: KvCacheScheme | None
) -> dict[str, Any]:
    """The same as `quantization_config` of `config.json`."""
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP_SIZE}
    group: dict[str, Any] = {"weights": dict(arguments), "targets": ["Linear"]}
    if scheme == "NVFP4":
        group["input_activations"] = dict(arguments)
    kv_cache = {} if kv_cache_scheme is None else {"kv_cache_scheme": _KV_CACHE_ARGUMENTS}
    return {
        **kv_cache,
        "config_groups": {"group_0": group},
        "ignore": list(exclude),
        "quant_algo": ALGORITHMS[scheme],
        "producer": dict(_PRODUCER),
        "quant_method": _METHOD,
    }


def is_modelopt(quantization_config: Any) -> bool:
    """Whether this `quantization_config` of a `config.json` is of this layout."""
    return isinstance(quantization_config, dict) and quantization_config.get("quant_method") == _METHOD


def read_hf_quant_config(
    path: Path, content: Mapping[str, Any]
) -> tuple[Scheme, KvCacheScheme | None, tuple[str, ...]]:
    """Both schemes and excluded names from `content` of the file `path`; names with wildcards are left out.

    A wildcard covers modules that have their own tensors in the files, so nothing is lost by that. Raises
    InputError for an algorithm, group size or KV cache format that has no counterpart in our other layout.
    """
    stored = content.get("quantization")
    if not isinstance(stored, dict):
        raise InputError(f'{path}: has no object "quantization"; download it again')
    algorithm, mend = stored.get("quant_algo"), "take another export of the model"
    scheme = next((scheme for scheme, name in ALGORITHMS.items() if name == algorithm), None)
    if scheme is None:
        raise InputError(f"{path}: quant_algo is {algorithm!r}, known are {', '.join(ALGORITHMS.values())}; {mend}")
    if stored.get("group_size") != GROUP_SIZE:
        raise InputError(f"{path}: group_size is {stored.get('group_size')!r}, NVFP4 has {GROUP_SIZE}; {mend}")
    kv_cache_algorithm = stored.get("kv_cache_quant_algo")
    if kv_cache_algorithm not in (None, _KV_CACHE_ALGORITHM):
        raise InputError(
            f"{path}: kv_cache_quant_algo is {kv_cache_algorithm!r}, known is {_KV_CACHE_ALGORITHM}; {mend}"
        )
    exclude = stored.get("exclude_modules", [])
    if not isinstance(exclude, list) or not all(isinstance(name, str) for name in exclude):
        raise InputError(f"{path}: exclude_modules is not a list of names; download it again")
    kv_cache_scheme: KvCacheScheme | None = None if kv_cache_algorithm is None else "fp8"
    return scheme, kv_cache_scheme, tuple(name for name in exclude if not set(name) & set("*?["))


def reciprocal(scale: Tensor) -> Tensor:
    """The multiplier of a divisor, or the divisor of a multiplier: FP32, rounded to nearest, in `scale`'s shape.

    The nearest is also the one that engines compute when they load a divisor, so weights come out the same to the
    bit from either layout. It does not always lead back: above a significand of √2, the reciprocals of FP32 numbers
    lie further apart than FP32 numbers do, and 17 % of all significands (14 % of scales that are spread evenly on a
    logarithmic axis) are the reciprocal of none, so that a neighbour of the nearest would not do either.
    `way_back.py` keeps those scales.
    """
    assert scale.dtype == torch.float32
    return scale.reciprocal()
