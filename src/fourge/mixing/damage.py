"""What a decoder layer's output loses when one of its groups, alone, is quantized: on held-out tokens, in the source.

Every group is tried within the source's own layer, on the source's own hidden states, so that the figures do not depend
on what becomes of the others, and one walk is enough for all of them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourge.checkpoint.architecture import LinearGroup
from fourge.checkpoint.compressed_tensors import QuantizedLinear
from fourge.checkpoint.layout import Layout
from fourge.methods.base import Method
from fourge.methods.observe import InputStatistics, input_global_scale
from fourge.nvfp4.fp8 import quantize_rows
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.progress import WalkProgress
from fourge.settings import QuantizeSettings
from fourge.walk.hidden import HiddenFile
from fourge.walk.lanes import quantized_layer, read_layer
from fourge.walk.layer import LaneLayer
from fourge.walk.observers import Observers
from fourge.walk.statistics import Estimate, clustered_mean
from fourge.walk.streams import Stream
from fourge.walk.walk import Advance, Walk, out_of_range, sequence_numbers


@dataclass(frozen=True)
class LayerTrial:
    """One decoder layer's turn, good for one `run`: from hidden states in `source` to those in `target`."""

    walk: Walk
    layout: Layout
    settings: QuantizeSettings
    method: Method
    layer: int
    source: HiddenFile
    target: HiddenFile
    progress: WalkProgress

    def run(self) -> dict[str, Any]:
        """Damages as JSON: of the `whole` layer in FP4, and of each of its `groups` in FP4 and in FP8.

        A damage is the mean over validation tokens of ‖y' − y‖² / ‖y‖², y the layer's output, residual stream and all.
        """
        weights = read_layer(self.walk, self.layout, self.layer, self.progress)
        statistics = self._run_source(weights)
        events: list[dict[str, Any]] = []
        in_fp4: dict[str, QuantizedLinear] = {}
        groups: dict[str, Any] = {}
        for group in self.layout.groups(self.layer):
            found = self._in_fp4(group, weights, statistics[group.name], events)
            in_fp8 = {name: QuantizedLinear(quantize_rows(w), None) for name, w in _sources(group, weights).items()}
            groups[group.name] = {
                self.settings.scheme: asdict(self._damage(weights, found)),
                "FP8": asdict(self._damage(weights, in_fp8)),
            }
            in_fp4 |= found
        return {"whole": asdict(self._damage(weights, in_fp4)), "groups": groups, "events": events}

    def _run_source(self, weights: Mapping[str, Tensor | QuantizedWeight]) -> dict[str, InputStatistics]:
        """Runs both sets through the layer as it is; what calibration saw of each group's input, by its name."""
        statistics = {
            group.name: InputStatistics(weigh_channels=self.method.weighs_channels)
            for group in self.layout.groups(self.layer)
        }
        for name, observers in (("calibration", Observers(statistics)), ("validation", Observers())):
            stream = self._stream(name)
            with LaneLayer(self.walk.skeleton, self.layer, weights, self.walk.dtype, observers.sites) as lane:
                self.walk.run(lane, stream, self.source, self.target, self._reporter(stream), observers)
        return statistics

    def _in_fp4(
        self,
        group: LinearGroup,
        weights: Mapping[str, Tensor | QuantizedWeight],
        seen: InputStatistics,
        events: list[dict[str, Any]],
    ) -> dict[str, QuantizedLinear]:
        sources = _sources(group, weights)
        round_rows = self.method.prepare_group(sources, seen, events)
        scale = input_global_scale(seen, self.settings.input_headroom) if self.settings.scheme == "NVFP4" else None
        return {name: QuantizedLinear(round_rows(weight), scale) for name, weight in sources.items()}

    def _damage(
        self, weights: Mapping[str, Tensor | QuantizedWeight], linears: Mapping[str, QuantizedLinear]
    ) -> Estimate:
        """That of the layer with `linears` in the place of the source's, against what `target` holds."""
        stream, errors = self._stream("validation"), []
        report = self._reporter(stream)
        with quantized_layer(self.walk, self.layout, self.layer, weights, linears) as lane:
            for batch in stream.batches:
                rows = self.source.read(batch.first_row, batch.last_row).to(self.walk.device)
                output = lane(rows.view(batch.count, batch.length, -1)).reshape(rows.shape)
                if not output.isfinite().all():
                    raise out_of_range(self.layer, "the validation set", "nvfp4", output.dtype)
                expected = self.target.read(batch.first_row, batch.last_row).to(output.device).double()
                norm = expected.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
                errors.append(((output.double() - expected).square().sum(1) / norm).cpu().numpy())
                report(len(rows) / stream.num_tokens, len(rows))
        return clustered_mean(np.concatenate(errors), sequence_numbers(stream))

    def _stream(self, name: str) -> Stream:
        stream = self.walk.stream(name, "bf16")
        assert stream is not None
        return stream

    def _reporter(self, stream: Stream) -> Advance:
        """Turns shares of a pass into shares of the layer's step."""
        part = stream.num_tokens / self.tokens_a_layer
        return lambda share, tokens: self.progress.advance(share * part, tokens=tokens)

    @property
    def tokens_a_layer(self) -> int:
        """Tokens that run through the layer in all its forms."""
        passes = 2 + 2 * len(self.layout.groups(self.layer))
        return self._stream("calibration").num_tokens + passes * self._stream("validation").num_tokens


def _sources(group: LinearGroup, weights: Mapping[str, Tensor | QuantizedWeight]) -> dict[str, Tensor]:
    found = {name: weights[f"{name}.weight"] for name in group.linears}
    return {name: weight for name, weight in found.items() if isinstance(weight, Tensor)}
