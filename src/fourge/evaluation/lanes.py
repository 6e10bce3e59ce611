"""The models of an evaluation, opened and held to be what they say, each to be walked in its lane."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourge.checkpoint.architecture import find_architecture
from fourge.checkpoint.layout import Layout, cut_layout, source_layout
from fourge.checkpoint.reader import Checkpoint, require_float, require_unquantized
from fourge.checks.config import check_config
from fourge.checks.expected import Expected, expect
from fourge.checks.files import require_quantized
from fourge.checks.report import Check
from fourge.checks.structure import check_tensors
from fourge.errors import InputError
from fourge.progress import WalkProgress
from fourge.walk.lanes import read_layer
from fourge.walk.layer import LaneLayer
from fourge.walk.model import require_finite_ends
from fourge.walk.quantized import QuantizedModel
from fourge.walk.ranks import Ranks
from fourge.walk.skeleton import Skeleton, load_config
from fourge.walk.streams import Lane
from fourge.walk.walk import Walk


@dataclass(frozen=True)
class ScoringLane:
    """One model: `walk` reads its checkpoint (and has no streams: what runs is the caller's)."""

    name: Lane
    walk: Walk
    layout: Layout
    quantized: QuantizedModel | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.walk.source

    @property
    def config(self) -> Any:
        """transformers' config."""
        return self.walk.skeleton.config

    def layer(self, index: int, progress: WalkProgress) -> LaneLayer:
        """Reads decoder layer `index`; to be used in a `with`."""
        if self.quantized is not None:
            return self.quantized.layer(self.walk, index, progress)
        weights = read_layer(self.walk, self.layout, index, progress)
        return LaneLayer(self.walk.skeleton, index, weights, self.walk.dtype)

    def require_finite_ends(self) -> None:
        """InputError for NaN and Inf in embedding, final norm and head."""
        require_finite_ends(self.checkpoint, self.layout)

    @property
    def layer_bytes(self) -> int:
        """The stored size of the largest decoder layer."""
        prefixes = [self.layout.architecture.layer_prefix(layer) for layer in range(self.layout.num_layers)]
        return max(
            sum(info.nbytes for name, info in self.checkpoint.tensors.items() if name.startswith(prefix))
            for prefix in prefixes
        )


def open_lanes(
    baseline: Path | None, quantized: Path | None, dtype: torch.dtype, ranks: Ranks
) -> tuple[ScoringLane, ...]:
    """The lanes that there are models for, `bf16` first, to be walked by `ranks`; InputError for what cannot be walked,
    or not together."""
    lanes = []
    if baseline is not None:
        lanes.append(_open_baseline(baseline, dtype, ranks))
    if quantized is not None:
        lanes.append(_open_quantized(quantized, dtype, ranks))
    if len(lanes) == 2 and lanes[0].walk.skeleton.shapes != lanes[1].walk.skeleton.shapes:
        raise InputError(
            f"--baseline {baseline} and {quantized} are not one model: their tensors' shapes differ; "
            "name the model that was quantized"
        )
    assert lanes, "an evaluation is of one model or two"
    return tuple(lanes)


def _open_baseline(directory: Path, dtype: torch.dtype, ranks: Ranks) -> ScoringLane:
    source = Checkpoint.open(directory)
    require_unquantized(source)
    require_float(source)
    skeleton = Skeleton(load_config(directory), find_architecture(source.config), ranks.device)
    layout = source_layout(
        skeleton.architecture, skeleton.num_layers, skeleton.shapes, source.tensors, skeleton.tied_head
    )
    return ScoringLane("bf16", Walk(skeleton, source, (), dtype, ranks.device, ranks), layout, None)


def _open_quantized(directory: Path, dtype: torch.dtype, ranks: Ranks) -> ScoringLane:
    require_quantized(directory)
    checkpoint = Checkpoint.open(directory)
    config, quantization = check_config(checkpoint.config)
    _require_passed(config, directory)
    assert quantization is not None
    expected = expect(directory, find_architecture(checkpoint.config), quantization)
    tensors, _ = check_tensors(checkpoint, expected)
    _require_passed(tensors, directory)
    _require_walkable(expected, directory)
    skeleton = Skeleton(expected.config, expected.architecture, ranks.device)
    head = f"{expected.architecture.head}.weight"
    shapes = {name: shape for name, shape in expected.shapes.items() if not (expected.tied_head and name == head)}
    layout = cut_layout(expected.architecture, expected.num_layers, shapes, expected.schemes)
    model = QuantizedModel(checkpoint, layout, expected.kv_cache_scheme)
    return ScoringLane("nvfp4", Walk(skeleton, checkpoint, (), dtype, ranks.device, ranks), layout, model)


def _require_passed(check: Check, directory: Path) -> None:
    if check.failures:
        raise InputError(f"{directory}: {check.failures[0]}; `fourge verify {directory}` says all that is wrong")


def _require_walkable(expected: Expected, directory: Path) -> None:
    """InputError for what is quantized and the walk runs in the source's dtype, or would run with half its inputs."""
    outside = sorted(expected.quantized.difference(expected.linears))
    if outside:
        raise InputError(f"{directory}: {outside[0]} is quantized, which the walk cannot run; use --engine hf or vllm")
    for layer in range(expected.num_layers):
        prefix = expected.architecture.layer_prefix(layer)
        for group in expected.architecture.groups:
            chosen = [prefix + linear in expected.quantized for linear in group.linears]
            if any(chosen) and not all(chosen):
                raise InputError(
                    f"{directory}: {prefix}{group.name} is quantized in part, and engines load it as one matrix; "
                    f"`fourge verify {directory}` says more"
                )
