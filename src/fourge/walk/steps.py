"""What a quantization does at each step of the walk: the embedding, a decoder layer, the head.

A step writes two temporary files, the output shard and the next hidden states, and gives the record to commit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fourge.checkpoint import compressed_tensors
from fourge.checkpoint.architecture import LinearGroup
from fourge.checkpoint.compressed_tensors import QuantizedLinear
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.reader import require_finite
from fourge.checkpoint.writer import Copied, write_safetensors
from fourge.methods.base import Method
from fourge.methods.hessian import HessianAccumulator
from fourge.methods.observe import InputStatistics, input_global_scale
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.progress import WalkProgress
from fourge.settings import QuantizeSettings
from fourge.walk.hidden import HiddenFile
from fourge.walk.job import Job, StepRecord, shard_name
from fourge.walk.layer import LaneLayer
from fourge.walk.linear import InputSite
from fourge.walk.streams import Stream
from fourge.walk.walk import Advance, SeenEnoughError, Walk
from fourge.walk.weight_error import relative_weight_error


@dataclass
class StepOutput:
    """What a step found out: tensors for its shard beside the copied ones, measures, events, a line for people."""

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    facts: str = ""


@dataclass(frozen=True)
class QuantizingWalk:
    """A walk that quantizes: runs one step at a time for a job. Holds no state between steps but the files."""

    walk: Walk
    layout: Layout
    settings: QuantizeSettings
    method: Method

    def costs(self) -> list[float]:
        """What each step costs relative to a decoder layer, for an ETA: arithmetic, or bytes where none is done."""
        sizes = [sum(self.walk.source.tensors[name].nbytes for name in names) for names in self.layout.steps]
        if not self.walk.streams:
            return [size / sizes[1] for size in sizes]
        probe = self.walk.stream("probe", "nvfp4")
        rows = 2 * probe.num_tokens if probe else 0
        # The embedding is looked up; the head is multiplied with the probe's rows alone, in both lanes.
        return [0.01, *[1.0] * self.layout.num_layers, 0.01 + sizes[0] / sizes[1] * rows / self.walk.hidden_layout.rows]

    def run(self, job: Job, progress: WalkProgress) -> None:
        """Runs and commits every step that is left."""
        for step in range(job.next_step, self.layout.num_steps):
            self._run_one(step, job, progress)

    def _run_one(self, step: int, job: Job, progress: WalkProgress) -> None:
        output, checksum = self._step(step, job, progress)
        shard = shard_name(step, self.layout.num_steps)
        written = write_safetensors(job.shard_temporary, self._entries(step, output.linears))
        job.commit(StepRecord(shard, written.size, written.sha256, checksum, output.measures, output.events))
        progress.finish_step(self.layout.step_name(step), output.facts, {"step": step} | output.measures)

    def _step(self, step: int, job: Job, progress: WalkProgress) -> tuple[StepOutput, int | None]:
        last = step == self.layout.num_steps - 1
        if not self.walk.streams:
            return (StepOutput() if step == 0 or last else self._layer(step - 1, None, None, progress)), None
        if last:
            with HiddenFile(job.hidden_path(step), self.walk.hidden_layout, create=False) as source:
                return self._head(source, progress), None
        with HiddenFile(job.hidden_temporary, self.walk.hidden_layout, create=True) as target:
            if step == 0:
                output = self._embedding(target, progress)
            else:
                with HiddenFile(job.hidden_path(step), self.walk.hidden_layout, create=False) as source:
                    output = self._layer(step - 1, source, target, progress)
            return output, target.finish()

    def _entries(self, step: int, linears: Mapping[str, QuantizedLinear]) -> dict[str, Tensor | Copied]:
        entries: dict[str, Tensor | Copied] = {}
        for name in self.layout.steps[step]:
            linear = name.removesuffix(".weight")
            if linear in linears:
                stored = compressed_tensors.tensors(linear, linears[linear])
                entries |= {key: tensor.cpu() for key, tensor in stored.items()}
            else:
                entries[name] = Copied(self.walk.source, name)
        return entries

    def _embedding(self, target: HiddenFile, progress: WalkProgress) -> StepOutput:
        self.walk.embed(target, lambda share, tokens: progress.advance(share, tokens=tokens))
        return StepOutput()

    def _head(self, source: HiddenFile, progress: WalkProgress) -> StepOutput:
        if self.walk.stream("probe", "nvfp4") is None:
            return StepOutput()
        fidelity = self.walk.fidelity(source, "probe", lambda share, _: progress.advance(share))
        return StepOutput(measures={"fidelity": asdict(fidelity)}, facts=f"KL {fidelity.kl_div}")

    # One decoder layer

    def _layer(
        self, layer: int, source: HiddenFile | None, target: HiddenFile | None, progress: WalkProgress
    ) -> StepOutput:
        output = StepOutput()
        weights = read_layer(self.walk, self.layout, layer, progress)
        weighs = self.method.weighs_channels
        statistics = {group.name: InputStatistics(weigh_channels=weighs) for group in self.layout.groups(layer)}
        if source is not None and target is not None:
            self._run_bf16(layer, weights, statistics, source, target, progress)
        linears = self._quantize(layer, weights, statistics, source, output)
        prefix = self.layout.architecture.layer_prefix(layer)
        output.linears = {prefix + name: linear for name, linear in linears.items()}
        errors = [linear["weight_error"] for linear in output.measures["linears"].values()]
        output.facts = f"weight error {max(errors):.4f}" if errors else "kept"
        if source is not None and target is not None:
            self._run_nvfp4(layer, weights, linears, source, target, progress)
            if self.walk.stream("probe", "nvfp4") is not None:
                error = self.walk.relative_error(target, "probe")
                output.measures["hidden_error"] = asdict(error)
                output.facts += f"  hidden error {error}"
        return output

    def _reporter(self, stream: Stream, progress: WalkProgress) -> Advance:
        """Turns shares of a stream's pass into shares of the layer's step."""
        part = stream.num_tokens / self.walk.hidden_layout.rows
        return lambda share, tokens: progress.advance(share * part, tokens=tokens)

    def _run_bf16(
        self,
        layer: int,
        weights: Mapping[str, Tensor | QuantizedWeight],
        statistics: Mapping[str, InputStatistics],
        source: HiddenFile,
        target: HiddenFile,
        progress: WalkProgress,
    ) -> None:
        # Observers sit in the layer that the calibration set runs through and in no other: the probe decides nothing.
        watched = {name: InputSite(observe=seen.observe) for name, seen in statistics.items()}
        for name, sites in (("calibration", watched), ("probe", None)):
            stream = self.walk.stream(name, "bf16")
            if stream is not None:
                with LaneLayer(self.walk.skeleton, layer, weights, self.walk.dtype, sites) as lane:
                    self.walk.run(lane, stream, source, target, self._reporter(stream, progress))

    def _quantize(
        self,
        layer: int,
        weights: dict[str, Tensor | QuantizedWeight],
        statistics: Mapping[str, InputStatistics],
        source: HiddenFile | None,
        output: StepOutput,
    ) -> dict[str, QuantizedLinear]:
        """Quantizes group after group, taking its source weights out of `weights` so that they are freed."""
        linears: dict[str, QuantizedLinear] = {}
        measured = output.measures["linears"] = {}
        for group in self.layout.groups(layer):
            seen = statistics[group.name] if self.walk.stream("calibration", "bf16") else None
            input_scale = self._input_scale(group, seen, output)
            if seen is not None and source is not None and self.method.needs_hessian:
                seen.hessian = self._hessian(layer, group, weights, linears, input_scale, source)
            held = {name: weights.pop(f"{name}.weight") for name in group.linears}
            sources = {name: weight for name, weight in held.items() if isinstance(weight, Tensor)}
            quantized = self.method.quantize_group(sources, seen, output.events)
            for name, weight in quantized.items():
                linears[name] = QuantizedLinear(weight, input_scale)
                measured[name] = {"weight_error": relative_weight_error(sources[name], weight)}
                if seen is not None:
                    measured[name] |= {"input_amax": float(seen.amax), "tokens": seen.tokens}
            if seen is not None:
                seen.hessian = None
        return linears

    def _input_scale(self, group: LinearGroup, seen: InputStatistics | None, output: StepOutput) -> Tensor | None:
        if seen is None or self.settings.scheme != "NVFP4":
            return None
        if seen.amax == 0:
            output.events.append({"event": "input is always zero", "group": group.name})
        return input_global_scale(seen, self.settings.input_headroom)

    def _hessian(
        self,
        layer: int,
        group: LinearGroup,
        weights: Mapping[str, Tensor | QuantizedWeight],
        linears: Mapping[str, QuantizedLinear],
        input_scale: Tensor | None,
        source: HiddenFile,
    ) -> HessianAccumulator:
        """XᵀX of what this group's Linears will multiply, given every layer and group before it as quantized."""
        stream = self.walk.stream("calibration", "nvfp4")
        assert stream is not None
        columns = self.layout.shapes[f"{self.layout.architecture.layer_prefix(layer)}{group.linears[0]}.weight"][1]
        hessian = HessianAccumulator(columns, self.walk.device)

        def observe(x: Tensor) -> None:
            hessian.add(x)
            raise SeenEnoughError

        here = InputSite(input_scale, observe)
        with quantized_layer(self.walk, self.layout, layer, weights, linears, {group.name: here}) as lane:
            self.walk.watch(lane, stream, source)
        return hessian

    def _run_nvfp4(
        self,
        layer: int,
        kept: Mapping[str, Tensor | QuantizedWeight],
        linears: Mapping[str, QuantizedLinear],
        source: HiddenFile,
        target: HiddenFile,
        progress: WalkProgress,
    ) -> None:
        with quantized_layer(self.walk, self.layout, layer, kept, linears) as lane:
            for name in ("calibration", "probe"):
                stream = self.walk.stream(name, "nvfp4")
                if stream is not None:
                    self.walk.run(lane, stream, source, target, self._reporter(stream, progress))


def read_layer(walk: Walk, layout: Layout, layer: int, progress: WalkProgress) -> dict[str, Tensor | QuantizedWeight]:
    """A layer's tensors as the source stores them, by name relative to it; InputError for NaN and Inf."""
    prefix = layout.architecture.layer_prefix(layer)
    weights: dict[str, Tensor | QuantizedWeight] = {}
    for name in layout.steps[layer + 1]:
        info = walk.source.tensors[name]
        tensor = walk.source.read(name)
        require_finite(tensor, info)
        weights[name.removeprefix(prefix)] = tensor.to(walk.device)
        progress.advance(0.0, read=info.nbytes)
    return weights


def quantized_layer(
    walk: Walk,
    layout: Layout,
    layer: int,
    kept: Mapping[str, Tensor | QuantizedWeight],
    linears: Mapping[str, QuantizedLinear],
    sites: Mapping[str, InputSite] | None = None,
) -> LaneLayer:
    """The layer as engines run it: quantized weights, inputs quantized by the group's `input_global_scale`.

    `kept` are the layer's other tensors and `linears` its quantized ones, both by name relative to the layer;
    groups of which no Linear is in `linears` stay as they are, or get the site that `sites` names for them.
    """
    weights = dict(kept) | {f"{name}.weight": linear.weight for name, linear in linears.items()}
    all_sites = dict(sites or {})
    for group in layout.groups(layer):
        if group.linears[0] in linears:
            scale = linears[group.linears[0]].input_global_scale
            all_sites[group.name] = InputSite(None if scale is None else scale.to(walk.device))
    return LaneLayer(walk.skeleton, layer, weights, walk.dtype, all_sites)
