"""Stored scales: usable numbers, and the same ones wherever engines join Linears into one matrix."""

from collections.abc import Collection, Iterable, Iterator

import numpy as np
import torch

from fourge.checkpoint.reader import Checkpoint
from fourge.checks.expected import Expected
from fourge.settings import LinearScheme

_LARGEST_POSITIVE = 0x7E
"""E4M3 bytes 0x01 to 0x7E are its positive finite values; above lie NaN, then everything negative."""

GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")


def scale_failures(checkpoint: Checkpoint, linear: str, scheme: LinearScheme, sound: Collection[str]) -> Iterator[str]:
    """What is wrong with the scales of `linear`: each must be finite and above zero. Others than `sound` are left.

    In FP8, whose codes can be NaN themselves, they must not be.
    """
    scale = f"{linear}.weight_scale"
    if scheme == "FP8":
        yield from _row_scale_failures(checkpoint, scale) if scale in sound else ()
        yield from _nan_failures(checkpoint, f"{linear}.weight") if f"{linear}.weight" in sound else ()
        return
    if scale in sound:
        yield from _group_scale_failures(checkpoint, scale)
    yield from scalar_failures(checkpoint, (f"{linear}.{suffix}" for suffix in GLOBAL_SCALES), sound)


def scalar_failures(checkpoint: Checkpoint, names: Iterable[str], sound: Collection[str]) -> Iterator[str]:
    """The same of scales that are one number each."""
    for name in names:
        if name in sound:
            value = float(checkpoint.read(name))
            if not (np.isfinite(value) and value > 0):
                yield f"{name} is {value}, must be finite and above 0"


def _group_scale_failures(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    info = checkpoint.tensors[name]
    bad, first, seen = 0, None, 0
    for chunk in checkpoint.chunks(name):
        codes = np.frombuffer(chunk, dtype=np.uint8)
        wrong = (codes == 0) | (codes > _LARGEST_POSITIVE)
        found = int(np.count_nonzero(wrong))
        if found and first is None:
            place = int(wrong.argmax())
            first = (seen + place, int(codes[place]))
        bad, seen = bad + found, seen + len(codes)
    if first is not None:
        index = [int(i) for i in np.unravel_index(first[0], info.shape)]
        value = float(torch.tensor([first[1]], dtype=torch.uint8).view(torch.float8_e4m3fn).float())
        yield f"{name}{index} is {value}, must be finite and above 0 ({bad:,} of {seen:,} scales are not)"


def _row_scale_failures(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    scale = checkpoint.read(name).float()
    wrong = ~(scale.isfinite() & (scale > 0))
    if wrong.any():
        row = int(wrong.flatten().int().argmax())
        value, count = float(scale[row]), int(wrong.sum())
        yield f"{name}[{row}] is {value}, must be finite and above 0 ({count:,} of {len(scale):,} scales are not)"


def _nan_failures(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    bad = 0
    for chunk in checkpoint.chunks(name):
        bad += int(np.count_nonzero((np.frombuffer(chunk, dtype=np.uint8) & 0x7F) == 0x7F))
    if bad:
        yield f"{name} has {bad:,} codes that are NaN"


def fused_failures(checkpoint: Checkpoint, expected: Expected, layer: int, sound: Collection[str]) -> Iterator[str]:
    """Fused groups of a layer that are quantized in part, in two schemes, or whose members differ in a global scale.

    Engines load a group as one matrix and take the larger divisor for all of it, so a member with another one
    comes out wrong by the ratio. Compared byte for byte.
    """
    prefix = expected.architecture.layer_prefix(layer)
    for group in expected.architecture.groups:
        members = [prefix + linear for linear in group.linears]
        quantized = [linear for linear in members if linear in expected.quantized]
        if quantized and len(quantized) < len(members):
            left = next(linear for linear in members if linear not in expected.quantized)
            yield f"{prefix}{group.name}: engines load it as one matrix, but {left} is not quantized"
        unlike = [linear for linear in quantized if expected.schemes[linear] != expected.schemes[quantized[0]]]
        if unlike:
            found = " and ".join(f"{linear} is {expected.schemes[linear]}" for linear in (quantized[0], unlike[0]))
            yield f"{prefix}{group.name}: engines load it as one matrix, but {found}"
        for suffix in GLOBAL_SCALES:
            stored = {
                linear: checkpoint.read(f"{linear}.{suffix}") for linear in quantized if f"{linear}.{suffix}" in sound
            }
            if len({scale.view(torch.uint8).numpy().tobytes() for scale in stored.values()}) > 1:
                values = ", ".join(f"{linear} {float(scale):g}" for linear, scale in stored.items())
                yield f"{suffix} differs within a fused group: {values}"
