"""Smoothing one decoder layer: exponents fitted on calibration tokens, kept where validation tokens say so, folded in.

Decided before anything else looks at the layer, so that whatever is observed and quantized after it sees the folded
tensors. Groups go last to first: what feeds `down_proj` and `o_proj` are rows of Linears of the groups before them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourge.checkpoint.architecture import LinearGroup
from fourge.checkpoint.layout import Layout
from fourge.methods.smooth import Rounding, Sample, Tie, choose, output_error
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.settings import QuantizeSettings
from fourge.walk.choices import Choices
from fourge.walk.folding import encode_exponents, find_tie, scale_, scalings, survives
from fourge.walk.hidden import HiddenFile
from fourge.walk.layer import LaneLayer
from fourge.walk.observers import Observers
from fourge.walk.walk import Walk

SAMPLED = 1024
"""Tokens of either set, and rows of each Linear, that the errors are estimated on."""
WATCHED = 4096
"""Tokens run through the layer for them: from so many the sample is drawn."""


class InputSample:
    """Some rows of an input that is seen in parts: which ones is drawn beforehand, from the `tokens` there will be."""

    def __init__(self, tokens: int, seed: int) -> None:
        self._chosen = _draw(tokens, seed)
        self._seen = 0
        self._rows: list[Tensor] = []

    def summarise(self, x: Tensor) -> Tensor:
        """A micro-batch of inputs `[..., K]` as rows."""
        return x.reshape(-1, x.shape[-1])

    def add(self, rows: Tensor) -> None:
        """Takes the next micro-batch's rows, `[tokens, K]`."""
        first, last = np.searchsorted(self._chosen, (self._seen, self._seen + len(rows)))
        self._rows.append(rows[torch.from_numpy(self._chosen[first:last] - self._seen).to(rows.device)])
        self._seen += len(rows)

    def rows(self) -> Tensor:
        """What was drawn, `[T, K]`."""
        return torch.cat(self._rows)


class LayerSmoothing:
    """The decisions for one layer's groups in NVFP4. `measures`, by group's name, and `events` are for the record."""

    def __init__(self, walk: Walk, layout: Layout, settings: QuantizeSettings, choices: Choices, layer: int) -> None:
        self.measures: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self._walk = walk
        self._layer = layer
        self._seed = settings.seed
        prefix = layout.architecture.layer_prefix(layer)
        self._groups = [group for group in layout.groups(layer) if choices.scheme(prefix, group) != "FP8"]
        self._roundings = {
            group.name: Rounding(
                choices.method(prefix, group).weighs_channels,
                choices.scheme(prefix, group) == "NVFP4",
                settings.input_headroom,
            )
            for group in self._groups
        }
        shapes = {name.removeprefix(prefix): shape for name, shape in layout.shapes.items() if name.startswith(prefix)}
        heads = int(walk.skeleton.config.num_key_value_heads)
        self._ties = {group.name: find_tie(group, shapes, heads) for group in self._groups}

    def fold(self, weights: dict[str, Tensor | QuantizedWeight], source: HiddenFile) -> frozenset[str]:
        """Multiplies tensors of `weights`, the layer's by relative name, in place; returns the names of those.

        `source` holds the hidden states before the layer.
        """
        tensors = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
        fitted = self._watch("calibration", weights, source)
        held_out = self._watch("validation", weights, source)
        changed: set[str] = set()
        for group in reversed(self._groups):
            exponents = self._decide(group, tensors, fitted.pop(group.name), held_out.pop(group.name))
            if exponents is not None:
                for scaling in scalings(group, exponents, self._ties[group.name], tensors):
                    scale_(tensors[scaling.name], scaling.dim, scaling.exponents)
                    changed.add(scaling.name)
        return frozenset(changed)

    def _watch(
        self, name: str, weights: Mapping[str, Tensor | QuantizedWeight], source: HiddenFile
    ) -> dict[str, InputSample]:
        """Samples of what the groups read when the bf16 lane runs part of the set `name`."""
        stream = self._walk.stream(name, "bf16")
        assert stream is not None
        batches = stream.spread_batches(WATCHED)
        tokens = sum(batch.num_tokens for batch in batches)
        samples = {group.name: InputSample(tokens, self._seed) for group in self._groups}
        observers = Observers(samples)
        with LaneLayer(self._walk.skeleton, self._layer, weights, self._walk.dtype, observers.sites) as lane:
            self._walk.watch(lane, batches, source, observers)
        return samples

    def _decide(
        self, group: LinearGroup, tensors: Mapping[str, Tensor], fitted: InputSample, held_out: InputSample
    ) -> Tensor | None:
        """The exponents for `group`, int8 `[P]`, or None where they do not lower the error on held-out tokens."""
        tie, rounding = self._ties[group.name], self._roundings[group.name]
        linears = [tensors[f"{linear}.weight"] for linear in group.linears]
        rows = [weight[torch.from_numpy(_draw(len(weight), self._seed)).to(weight.device)] for weight in linears]
        largest = torch.stack([column_maxima(weight) for weight in linears]).amax(0)
        powers, exponents = choose(Sample(fitted.rows(), rows, largest), tie, rounding, self._walk.ranks.map)
        exponents = self._exact(group, exponents, tie, tensors)
        judge = Sample(held_out.rows(), rows, largest)
        before, after = self._walk.ranks.map(
            lambda tried: output_error(judge, tie.to_inputs(tried), rounding),
            [torch.zeros_like(exponents), exponents],
        )
        kept = after < before
        self.measures[group.name] = {"powers": list(powers), "validation_error": [before, after], "kept": kept}
        if kept:
            self.measures[group.name]["exponents"] = encode_exponents(exponents)
        return exponents if kept else None

    def _exact(self, group: LinearGroup, exponents: Tensor, tie: Tie, tensors: Mapping[str, Tensor]) -> Tensor:
        """`exponents` but for the channels where a product would lose bits: those get 0, and that is recorded."""
        exact = torch.ones_like(exponents, dtype=torch.bool)
        for scaling in scalings(group, exponents, tie, tensors):
            fine = survives(tensors[scaling.name], scaling.dim, scaling.exponents)
            exact &= fine if scaling.dim == 0 else tie.by_channel(fine).all(1)
        if not exact.all():
            channels = int((~exact).sum())
            self.events.append(
                {"event": "channels not smoothed, for not exactly", "group": group.name, "channels": channels}
            )
        return exponents * exact


def column_maxima(weight: Tensor) -> Tensor:
    """The largest magnitude in each column of `weight` `[N, K]`, FP32 `[K]`, without a copy of it."""
    low, high = torch.aminmax(weight, dim=0)
    return torch.maximum(-low, high).float()


def smoothing_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """What smoothing a layer takes beside the layer: both samples, and one group's folded, rounded and evened."""
    widths = [
        layout.shapes[f"{layout.architecture.layer_prefix(0)}{group.linears[0]}.weight"][1]
        for group in layout.architecture.groups
    ]
    return SAMPLED * (2 * sum(widths) * dtype.itemsize + 10 * max(widths) * torch.float32.itemsize)


def _draw(count: int, seed: int) -> np.ndarray:
    """Up to `SAMPLED` of the numbers below `count`, ascending; the same ones for the same arguments."""
    generator = np.random.Generator(np.random.PCG64([seed, count]))
    return np.sort(generator.permutation(count)[:SAMPLED])
