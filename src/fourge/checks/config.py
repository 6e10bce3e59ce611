"""The `quantization_config` of config.json: as compressed-tensors parses it, and of a scheme that engines know."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourge.checkpoint.compressed_tensors import FORMAT, FP8_FORMAT, KV_CACHE_FP8, one_format
from fourge.checks.report import Check, conclude
from fourge.settings import KvCacheScheme, LinearScheme

_FIXED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
_FORMATS: Mapping[LinearScheme, str] = {"NVFP4": FORMAT, "NVFP4A16": FORMAT, "FP8": FP8_FORMAT}
_PRESETS: Mapping[LinearScheme, str] = {"NVFP4": "NVFP4", "NVFP4A16": "NVFP4A16", "FP8": "FP8_DYNAMIC"}
_ARGUMENTS = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic")


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says is quantized, in its own patterns: targets by group, each of one scheme."""

    groups: tuple[tuple[LinearScheme, tuple[str, ...]], ...]
    ignore: tuple[str, ...]
    kv_cache_scheme: KvCacheScheme | None

    @property
    def scheme(self) -> LinearScheme | None:
        """The one scheme of all groups; None for a mixture."""
        first, *others = dict.fromkeys(scheme for scheme, _ in self.groups)
        return None if others else first


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
        failures += _scheme_failures(stored, [scheme for scheme, _ in quantization.groups])
    kv_cache = "" if quantization.kv_cache_scheme is None else f", KV cache {quantization.kv_cache_scheme}"
    groups = "; ".join(f"{scheme}, targets {_shown(targets)}" for scheme, targets in quantization.groups)
    detail = (
        f"{groups}{kv_cache}, {len(quantization.ignore)} ignored; parsed by compressed-tensors {_library_version()}"
    )
    return conclude("config", detail, failures), quantization


def _library_version() -> str:
    import compressed_tensors

    return str(compressed_tensors.__version__)


def _read(stored: Mapping[str, Any]) -> Quantization:
    """Scheme and patterns from the raw JSON; ValueError, with what is wrong, where they cannot be told."""
    groups = stored.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("config_groups: expected an object with a group at least")
    if not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError("config_groups: a group is not an object")
    return Quantization(
        groups=tuple((_group_scheme(group), _patterns("targets", group.get("targets"))) for group in groups.values()),
        ignore=_patterns("ignore", stored.get("ignore") or []),
        # Of another kind, it is a failure, and what it calls for cannot be told.
        kv_cache_scheme=None if stored.get("kv_cache_scheme") is None or _kv_cache_difference(stored) else "fp8",
    )


def _group_scheme(group: Mapping[str, Any]) -> LinearScheme:
    """What a group is meant to be; whether it is that, `_scheme_failures` says."""
    weights = group.get("weights")
    in_rows = isinstance(weights, dict) and (weights.get("num_bits"), weights.get("strategy")) == (8, "channel")
    if (group.get("format") or (FP8_FORMAT if in_rows else None)) == FP8_FORMAT:
        return "FP8"
    return "NVFP4A16" if group.get("input_activations") is None else "NVFP4"


def _shown(targets: Sequence[str]) -> str:
    """The groups of a mixture name every Linear: the first few will do."""
    more = f" and {len(targets) - 3} more" if len(targets) > 4 else ""
    return ", ".join(targets[:3] if more else targets) + more


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


def _scheme_failures(stored: Mapping[str, Any], schemes: Sequence[LinearScheme]) -> Iterator[str]:
    """Differences from compressed-tensors' own presets of those names. Its observers do not concern a reader."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    groups = QuantizationConfig.model_validate(dict(stored)).config_groups
    if set(schemes) == {"FP8"}:
        yield "all groups are FP8: this is no NVFP4 checkpoint"
    expected = one_format(_FORMATS[scheme] for scheme in schemes)
    if stored.get("format") != expected:
        yield f"format is {stored.get('format')!r}, expected {expected!r}"
    for (name, group), scheme in zip(groups.items(), schemes, strict=True):
        place = "" if len(groups) == 1 else f"{name}: "
        preset = preset_name_to_scheme(_PRESETS[scheme], group.targets)
        if group.format not in (None, _FORMATS[scheme]):
            yield f"{place}the group's format is {group.format!r}, expected {_FORMATS[scheme]!r}"
        for part in ("weights", "input_activations", "output_activations"):
            ours, theirs = getattr(group, part), getattr(preset, part)
            if (ours is None) != (theirs is None):
                yield f"{place}{part} is {'absent' if ours is None else 'present'}, which is not {scheme}"
            elif ours is not None:
                for key in _ARGUMENTS:
                    if getattr(ours, key) != getattr(theirs, key):
                        yield f"{place}{part}.{key} is {getattr(ours, key)!r}, {scheme} has {getattr(theirs, key)!r}"
