"""The `quantization_config` of config.json: as compressed-tensors parses it, and of a scheme that engines know."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fourge.checkpoint.compressed_tensors import FORMAT, KV_CACHE_FP8
from fourge.checks.report import Check, conclude
from fourge.settings import KvCacheScheme, Scheme

_FIXED = {"quant_method": "compressed-tensors", "format": FORMAT, "quantization_status": "compressed"}
_ARGUMENTS = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic")


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says is quantized, in its own patterns."""

    scheme: Scheme
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    kv_cache_scheme: KvCacheScheme | None


def check_config(config: Mapping[str, Any]) -> tuple[Check, Quantization | None]:
    """Looks at `config["quantization_config"]`.

    The second value is None only where targets, ignore and scheme cannot be told; a config that readers would
    reject for another reason still says what should be in the files, and that is looked at too.
    """
    stored = config["quantization_config"]
    if not isinstance(stored, dict):
        return conclude("config", "quantization_config", ["quantization_config is not an object"]), None
    try:
        quantization = _read(stored)
    except ValueError as error:
        failures = [str(error), *_parse_failures(stored), *_fixed_failures(stored)]
        return conclude("config", "quantization_config", failures), None
    failures = [*_parse_failures(stored), *_fixed_failures(stored)]
    if not failures:
        failures += _scheme_failures(stored, quantization.scheme)
    kv_cache = "" if quantization.kv_cache_scheme is None else f", KV cache {quantization.kv_cache_scheme}"
    detail = (
        f"{quantization.scheme}{kv_cache}, targets {', '.join(quantization.targets)}, "
        f"{len(quantization.ignore)} ignored; parsed by compressed-tensors {_library_version()}"
    )
    return conclude("config", detail, failures), quantization


def _library_version() -> str:
    import compressed_tensors

    return str(compressed_tensors.__version__)


def _read(stored: Mapping[str, Any]) -> Quantization:
    """Scheme and patterns from the raw JSON; ValueError, with what is wrong, where they cannot be told."""
    groups = stored.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError("config_groups: expected one group")
    (group,) = groups.values()
    if not isinstance(group, dict):
        raise ValueError("config_groups: the group is not an object")
    return Quantization(
        scheme="NVFP4A16" if group.get("input_activations") is None else "NVFP4",
        targets=_patterns("targets", group.get("targets")),
        ignore=_patterns("ignore", stored.get("ignore") or []),
        # Of another kind, it is a failure, and what it calls for cannot be told.
        kv_cache_scheme=None if stored.get("kv_cache_scheme") is None or _kv_cache_difference(stored) else "fp8",
    )


def _patterns(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{key}: {value!r} is not a list of names and patterns")
    for pattern in value:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"{key}: {pattern} is not a regular expression: {error}") from error
    return tuple(value)


def _parse_failures(stored: Mapping[str, Any]) -> Iterator[str]:
    """What compressed-tensors' own reader rejects; engines use the same one, most of them an older."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        QuantizationConfig.model_validate(dict(stored))
    except ValidationError as error:
        for problem in error.errors():
            # A group may also be a list of names; that this one is no list says nothing of what is wrong with it.
            if "list[str]" not in problem["loc"]:
                place = ".".join(str(part) for part in problem["loc"])
                yield f"{place}: compressed-tensors rejects it: {problem['msg']}"
    except NotImplementedError as error:
        yield f"compressed-tensors rejects it: {error}"


def _fixed_failures(stored: Mapping[str, Any]) -> Iterator[str]:
    for key, expected in _FIXED.items():
        if stored.get(key) != expected:
            yield f"{key} is {stored.get(key)!r}, expected {expected!r}"
    difference = _kv_cache_difference(stored)
    if difference is not None:
        yield difference
    if stored.get("transform_config"):
        yield "transform_config is set: what it adds to the files is not known here and cannot be verified"


def _kv_cache_difference(stored: Mapping[str, Any]) -> str | None:
    """What keeps `kv_cache_scheme`, where it is set, from being FP8 with one scale a tensor."""
    scheme = stored.get("kv_cache_scheme")
    if scheme is None:
        return None
    if not isinstance(scheme, dict):
        return f"kv_cache_scheme is {scheme!r}, expected an object"
    for key, expected in KV_CACHE_FP8.items():
        # Absent, `dynamic` is false; the others engines look for.
        found = scheme.get(key, False if key == "dynamic" else None)
        if found != expected:
            return f"kv_cache_scheme.{key} is {found!r}, known is {expected!r} (FP8, one scale a tensor)"
    return None


def _scheme_failures(stored: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """Differences from compressed-tensors' own preset of that name. Its observers do not concern a reader."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    (group,) = QuantizationConfig.model_validate(dict(stored)).config_groups.values()
    preset = preset_name_to_scheme(scheme, group.targets)
    if group.format not in (None, FORMAT):
        yield f"the group's format is {group.format!r}, expected {FORMAT!r}"
    for part in ("weights", "input_activations", "output_activations"):
        ours, theirs = getattr(group, part), getattr(preset, part)
        if (ours is None) != (theirs is None):
            yield f"{part} is {'absent' if ours is None else 'present'}, which is not {scheme}"
        elif ours is not None:
            for name in _ARGUMENTS:
                if getattr(ours, name) != getattr(theirs, name):
                    yield f"{part}.{name} is {getattr(ours, name)!r}, {scheme} has {getattr(theirs, name)!r}"
