"""The quantized directory beside its source: what must be the same, and how far the rest may be off."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fourge.checkpoint.compressed_tensors import WEIGHT_PARTS
from fourge.checkpoint.folder import CARD, PROVENANCE, has_own_card
from fourge.checkpoint.header import parse_object
from fourge.checkpoint.reader import Checkpoint, require_finite
from fourge.checks.expected import Expected
from fourge.checks.report import Check, conclude, count
from fourge.errors import InputError
from fourge.methods.tuned import MOST_MOVED
from fourge.nvfp4.fp8 import Fp8Weight, quantize_rows, squared_row_errors
from fourge.nvfp4.quantize import QuantizedWeight, amax, global_scale, quantize_weight, squared_errors
from fourge.settings import LinearScheme, Rule
from fourge.walk.choices import Selection
from fourge.walk.job import Manifest
from fourge.walk.weight_error import RelativeError, row_blocks

_ERROR_RATIO = 2.0
_ERROR_SLACK = 1e-3

_ABSENT = object()


def check_sidecars(checkpoint: Checkpoint, source: Checkpoint) -> Check:
    """Tokenizer, chat template, generation config, licence, …: every one of the source's, byte for byte.

    A card of our own stands in the place of the source's.
    """
    failures = []
    own_card = has_own_card(checkpoint.directory)
    paths = [path for path in source.sidecars() if not (path.name == CARD and own_card)]
    for path in paths:
        ours = checkpoint.directory / path.name
        if not ours.is_file():
            failures.append(f"{path.name} is missing")
        elif ours.read_bytes() != path.read_bytes():
            failures.append(f"{path.name} differs from the source's")
    return conclude("sidecars", f"{count(len(paths), 'file')} beside the weights", failures)


def check_source_config(checkpoint: Checkpoint, source: Checkpoint) -> Check:
    """`config.json` is the source's, but for `quantization_config`."""
    ours: dict[str, Any] = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    failures = []
    for key in sorted(ours.keys() | source.config.keys()):
        here, there = ours.get(key, _ABSENT), source.config.get(key, _ABSENT)
        if here is _ABSENT:
            failures.append(f"config.json: {key} is absent, the source has {there!r}")
        elif there is _ABSENT:
            failures.append(f"config.json: {key} is {here!r}, the source has none")
        elif here != there:
            failures.append(f"config.json: {key} is {here!r}, the source has {there!r}")
    return conclude("source_config", f"{count(len(ours), 'key')} of config.json", failures)


def unquantized_failures(checkpoint: Checkpoint, source: Checkpoint, expected: Expected, name: str) -> Iterator[str]:
    """How the unquantized tensor `name`, which is in both the config and the directory, differs from the source's.

    A tied head that was written out is held against the source's embedding, where the source has no head.
    """
    architecture = expected.architecture
    theirs = name
    if expected.tied_head and name == f"{architecture.head}.weight" and name not in source.tensors:
        theirs = f"{architecture.embedding}.weight"
    if theirs not in source.tensors:
        yield f"{name} is not in the source"
        return
    ours, there = checkpoint.tensors[name], source.tensors[theirs]
    if (ours.dtype, ours.shape) != (there.dtype, there.shape):
        yield (f"{name} is {ours.dtype} {list(ours.shape)}, the source's {theirs} is {there.dtype} {list(there.shape)}")
    elif any(a != b for a, b in zip(checkpoint.chunks(name), source.chunks(theirs), strict=True)):
        yield f"{name} differs from the source's bytes"


def measure_group(
    checkpoint: Checkpoint, source: Checkpoint, group: Collection[str], schemes: Mapping[str, LinearScheme]
) -> Iterator[tuple[str, float, float]]:
    """Per Linear of a group that shares its global scale: its name, its relative error, the max method's.

    Of those that `schemes` has in FP8, where nothing is shared, a row at a time.

    Both are ‖Ŵ − W‖ / ‖W‖ against the source's weight: of what is stored, and of what max calibration, computed
    here, would have stored. Blocks of rows are read, the source's twice: for the global scale, then for the
    errors. Raises InputError where the source has NaN or Inf.
    """
    for linear in group:
        if schemes[linear] == "FP8":
            yield linear, *_measure_rows(checkpoint, source, linear)
    group = [linear for linear in group if schemes[linear] != "FP8"]
    largest = torch.zeros(())
    for linear in group:
        info = source.tensors[f"{linear}.weight"]
        for rows in row_blocks(info.shape):
            weight = source.read(info.name, rows)
            require_finite(weight, info, rows.start)
            largest = torch.maximum(largest, amax(weight))
    divisor = global_scale(largest)
    for linear in group:
        stored, reference = RelativeError(), RelativeError()
        stored_divisor = checkpoint.read(f"{linear}.weight_global_scale")
        name = f"{linear}.weight"
        for rows in row_blocks(source.tensors[name].shape):
            weight = source.read(name, rows)
            block = QuantizedWeight(
                checkpoint.read(f"{linear}.weight_packed", rows),
                checkpoint.read(f"{linear}.weight_scale", rows),
                stored_divisor,
            )
            stored.add(*squared_errors(weight, block))
            reference.add(*squared_errors(weight, quantize_weight(weight, divisor)))
        yield linear, stored.value, reference.value


def _measure_rows(checkpoint: Checkpoint, source: Checkpoint, linear: str) -> tuple[float, float]:
    """`measure_group` for one Linear in FP8."""
    stored, reference = RelativeError(), RelativeError()
    info = source.tensors[f"{linear}.weight"]
    for rows in row_blocks(info.shape):
        weight = source.read(info.name, rows)
        require_finite(weight, info, rows.start)
        codes, scale = (checkpoint.read(f"{linear}.{part}", rows) for part in WEIGHT_PARTS["FP8"])
        stored.add(*squared_row_errors(weight, Fp8Weight(codes, scale)))
        reference.add(*squared_row_errors(weight, quantize_rows(weight)))
    return stored.value, reference.value


def allowed_error(reference: float, moved: float = 0.0) -> float:
    """The largest relative error of a Linear that passes, given the max method's on the same weight.

    Max calibration puts every weight on the nearest value of its group's grid: a mean square error of 1/12 of a
    squared step. A method that minimises the layer's output instead (GPTQ) does not always take the nearer
    neighbour, but one that tossed a coin between the two would come to 1/3, twice the relative error, so a method
    that looks at its weights stays below that. Damage is of another size: swapped nibbles, rows in another order or
    another tensor's scales leave values that have nothing to do with the source's, an error of about √2 where the
    format's own is about 0.1. The slack is for weights that NVFP4 holds exactly, where twice nothing is nothing.
    `moved` is how far the method may have moved the weights before it rounded them, relative to them.
    """
    return _ERROR_RATIO * reference + _ERROR_SLACK + moved


def most_moved(manifest: Manifest | None, directory: Path, expected: Expected) -> dict[str, float]:
    """How far the recorded methods may move weights, ‖W* − W‖ / ‖W‖, by Linear: none without a record, none in FP8.

    `fourge.json` has the record too. One that cannot be read allows nothing; the check of the record itself says so.
    """
    if manifest is None and not (directory / PROVENANCE).exists():
        return {}
    try:
        choices = _recorded_selection(manifest, directory).resolve(
            expected.modules, expected.architecture, expected.num_layers
        )
    except (InputError, KeyError, TypeError):
        return {}
    return {name: MOST_MOVED for name, method in choices.methods.items() if method.compensates}


def _recorded_selection(manifest: Manifest | None, directory: Path) -> Selection:
    """What the settings say; InputError, KeyError or TypeError where they do not."""
    path = directory / PROVENANCE
    settings = manifest.settings if manifest is not None else parse_object(path.read_bytes(), str(path))["settings"]
    targets, ignore = tuple(settings["targets"]), tuple(settings["ignore"])
    rules = [Rule(tuple(rule["targets"]), rule["scheme"], rule["method"]) for rule in settings.get("recipe_file") or ()]
    return Selection(targets, ignore, settings["scheme"], settings["method"], tuple(rules))
