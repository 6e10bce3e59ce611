"""What a run was asked to do, resolved once, and which of it a continued run may change."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Scheme = Literal["NVFP4", "NVFP4A16"]
LinearScheme = Literal["NVFP4", "NVFP4A16", "FP8"]
"""What a quantized Linear is stored in; FP8 by a recipe file alone."""
RuleScheme = Literal["NVFP4", "NVFP4A16", "FP8", "BF16"]
"""BF16 leaves a Linear as it is, whatever dtype the source has."""
KvCacheScheme = Literal["fp8"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Backend = Literal["auto", "torch", "numba", "triton"]

DEFAULT_CALIBRATION = "HuggingFaceH4/ultrachat_200k"
DEFAULT_TARGETS = ("Linear",)
DEFAULT_IGNORE = ("lm_head",)
"""What is quantized, and what of it is left, where nothing else is asked for."""

FREE_ON_CONTINUATION: Mapping[str, str] = {
    "model": "the source may have moved; its headers are compared instead",
    "revision": "likewise",
    "device": "another device rounds sums differently; the file stays valid, byte identity needs the same device",
    "threads": "likewise: how sums are split follows the number of threads",
    "backend": "all of them give the same bits",
}
"""Settings that may differ when a job is continued, and why. Every other one is part of the fingerprint."""


@dataclass(frozen=True)
class Rule:
    """One rule of a recipe file: Linears that match one of `targets` get `scheme` and `method`, as far as it has them.

    Targets are in compressed-tensors' language: names, classes or `re:…`.
    """

    targets: tuple[str, ...]
    scheme: RuleScheme | None = None
    method: str | None = None


@dataclass(frozen=True)
class QuantizeSettings:
    """The resolved settings of `fourge quantize`; field names are the options' names."""

    model: str
    revision: str | None
    scheme: Scheme
    kv_cache_scheme: KvCacheScheme | None
    method: str
    smooth: bool
    recipe_file: tuple[Rule, ...] | None
    """The content, not the name: a continued run must share it."""
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    calibration: str
    probe: str | None
    num_calibration_samples: int
    num_validation_samples: int
    num_probe_samples: int
    max_seq_length: int
    seed: int
    input_headroom: float
    micro_batch_tokens: int
    compute_dtype: str
    device: str
    threads: int
    backend: str

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values (tuples become lists)."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def fingerprint(self) -> dict[str, Any]:
        """The part that a continued run must share, keyed by option name."""
        return {key: value for key, value in self.to_json().items() if key not in FREE_ON_CONTINUATION}


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first key, in sorted order, under which two fingerprints differ; None when they are equal."""
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            return key
    return None
