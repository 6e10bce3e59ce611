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
from fourge.settings import Scheme

HF_QUANT_CONFIG = "hf_quant_config.json"
"""What is quantized and how; the same is said, in other words, in `quantization_config` of `config.json`."""

ALGORITHMS: Mapping[Scheme, str] = {"NVFP4": "NVFP4", "NVFP4A16": "W4A16_NVFP4"}
"""`quant_algo` of the schemes."""

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Engines read the layout from a producer of this name only; the version is the release whose fields these are."""

_METHOD = "modelopt"


def hf_quant_config(scheme: Scheme, exclude: Sequence[str]) -> dict[str, Any]:
    """The content of `hf_quant_config.json`; `exclude` names every module with a matrix that is not quantized."""
    return {
        "producer": dict(_PRODUCER),
        "quantization": {
            "quant_algo": ALGORITHMS[scheme],
            "kv_cache_quant_algo": None,
            "group_size": GROUP_SIZE,
            "exclude_modules": list(exclude),
        },
    }


def quantization_config(scheme: Scheme, exclude: Sequence[str]) -> dict[str, Any]:
    """The same as `quantization_config` of `config.json`."""
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP_SIZE}
    group: dict[str, Any] = {"weights": dict(arguments), "targets": ["Linear"]}
    if scheme == "NVFP4":
        group["input_activations"] = dict(arguments)
    return {
        "config_groups": {"group_0": group},
        "ignore": list(exclude),
        "quant_algo": ALGORITHMS[scheme],
        "producer": dict(_PRODUCER),
        "quant_method": _METHOD,
    }


def is_modelopt(quantization_config: Any) -> bool:
    """Whether this `quantization_config` of a `config.json` is of this layout."""
    return isinstance(quantization_config, dict) and quantization_config.get("quant_method") == _METHOD


def read_hf_quant_config(path: Path, content: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    """Scheme and excluded names from `content` of the file `path`; names with `*` or other wildcards are left out.

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
    if stored.get("kv_cache_quant_algo") is not None:
        raise InputError(
            f"{path}: kv_cache_quant_algo is {stored['kv_cache_quant_algo']!r}: scales of the KV cache cannot be "
            "converted; take an export without them"
        )
    exclude = stored.get("exclude_modules", [])
    if not isinstance(exclude, list) or not all(isinstance(name, str) for name in exclude):
        raise InputError(f"{path}: exclude_modules is not a list of names; download it again")
    return scheme, tuple(name for name in exclude if not set(name) & set("*?["))


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
