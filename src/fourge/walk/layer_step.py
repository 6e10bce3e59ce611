"""What a quantization does with one decoder layer: smooth, observe, quantize, and hand the hidden states on."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fourge.checkpoint.architecture import LinearGroup
from fourge.checkpoint.compressed_tensors import KvScales, QuantizedLinear
from fourge.checkpoint.layout import Layout
from fourge.methods.hessian import HessianAccumulator
from fourge.methods.observe import InputStatistics, input_global_scale
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.progress import WalkProgress
from fourge.settings import QuantizeSettings
from fourge.walk.choices import Choices
from fourge.walk.compensation import SERVED, GroupLanes, GroupTap, TappedLane, compensate_group
from fourge.walk.hidden import HiddenFile
from fourge.walk.kv_cache import KvObserver
from fourge.walk.lanes import LayerWeights, quantized_layer
from fourge.walk.layer import LaneLayer
from fourge.walk.linear import InputSite, to_nvfp4
from fourge.walk.observers import Observers
from fourge.walk.row_split import quantize_by_rows
from fourge.walk.smoothing import LayerSmoothing
from fourge.walk.streams import Lane, Stream
from fourge.walk.walk import Advance, Walk


@dataclass
class StepOutput:
    """What a step found out: tensors for its shard beside the copied ones, measures, events, a line for people.

    `linears` and `tensors` by full name; `tensors` are those that are no longer the source's bytes.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kv_scales: KvScales | None = None
    measures: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    facts: str = ""

    def decided(self) -> dict[str, Any]:
        """Whatever was found out or decided, so that ranks can be held against each other."""
        return {"measures": self.measures, "events": self.events}


@dataclass(frozen=True)
class HiddenStates:
    """Before the layer, and after it."""

    source: HiddenFile
    target: HiddenFile


class LayerStep:
    """One decoder layer's way through a quantization with data, good for one `run`.

    `weights` are the layer's tensors as the source stores them. Smoothing changes some in place before anything else
    looks at them; quantizing takes the groups out one after the other, so that they are freed.
    """

    def __init__(
        self,
        walk: Walk,
        layout: Layout,
        settings: QuantizeSettings,
        choices: Choices,
        layer: int,
        weights: LayerWeights,
        states: HiddenStates,
        progress: WalkProgress,
    ) -> None:
        self.walk = walk
        self.layout = layout
        self.settings = settings
        self.choices = choices
        self.prefix = layout.architecture.layer_prefix(layer)
        self.layer = layer
        self.states = states
        self.progress = progress
        self.weights = weights
        self.output = StepOutput()

    def run(self) -> StepOutput:
        """From `weights` to the tensors of the shard, and from `states.source` to `states.target`."""
        smoothed = self._smooth()
        statistics = self._observe()
        linears = self._quantize(statistics)
        self.output.linears = {self.prefix + name: linear for name, linear in linears.items()}
        for name in smoothed & self.weights.keys():
            tensor = self.weights[name]
            assert isinstance(tensor, Tensor)
            self.output.tensors[self.prefix + name] = tensor
        errors = [linear["weight_error"] for linear in self.output.measures["linears"].values()]
        self.output.facts = f"weight error {max(errors):.4f}" if errors else "kept"
        self._propagate(linears)
        return self.output

    def _smooth(self) -> frozenset[str]:
        """The names of the tensors that are not the source's any more."""
        if not self.settings.smooth:
            return frozenset()
        smoothing = LayerSmoothing(self.walk, self.layout, self.settings, self.choices, self.layer)
        changed = smoothing.fold(self.weights, self.states.source)
        self.output.measures["smoothing"] = smoothing.measures
        self.output.events += smoothing.events
        return changed

    def _observe(self) -> dict[str, InputStatistics]:
        """Runs the bf16 lane; what calibration saw of every group's input, by the group's name."""
        statistics = {
            group.name: InputStatistics(weigh_channels=self.choices.method(self.prefix, group).weighs_channels)
            for group in self.layout.groups(self.layer)
        }
        kv_observer = None if self.settings.kv_cache_scheme is None else KvObserver()
        self._run_bf16(statistics, kv_observer)
        if kv_observer is not None:
            self.output.kv_scales = kv_observer.scales(self.output.events)
            amax = {"k_amax": float(kv_observer.k_amax), "v_amax": float(kv_observer.v_amax)}
            self.output.measures["kv_cache"] = amax
        return statistics

    def _run_bf16(self, statistics: Mapping[str, InputStatistics], kv_observer: KvObserver | None) -> None:
        # Observers sit in the layer that the calibration set runs through and in no other: the probe decides nothing.
        for name, observers, kv_cache in (
            ("calibration", Observers(statistics), kv_observer),
            ("validation", Observers(), None),
            ("probe", Observers(), None),
        ):
            stream = self.walk.stream(name, "bf16")
            if stream is not None:
                sites = observers.sites
                with LaneLayer(self.walk.skeleton, self.layer, self.weights, self.walk.dtype, sites, kv_cache) as lane:
                    self._run(lane, stream, observers)
        calibration = self.walk.stream("calibration", "bf16")
        for seen in statistics.values():
            seen.tokens = 0 if calibration is None else calibration.num_tokens
        if kv_observer is not None:
            kv_observer.agree(self.walk.ranks)

    def _run(self, lane: LaneLayer, stream: Stream, observers: Observers | None = None) -> None:
        states = self.states
        self.walk.run(lane, stream, states.source, states.target, self._reporter(stream), observers)

    def _reporter(self, stream: Stream) -> Advance:
        """Turns shares of a stream's pass into shares of the layer's step."""
        part = stream.num_tokens / self.walk.hidden_layout.rows
        return lambda share, tokens: self.progress.advance(share * part, tokens=tokens)

    def _quantize(self, statistics: Mapping[str, InputStatistics]) -> dict[str, QuantizedLinear]:
        """Quantizes group after group; the Linears by name relative to the layer."""
        linears: dict[str, QuantizedLinear] = {}
        measured = self.output.measures["linears"] = {}
        whole = dict(self.weights) if self.choices.compensates else {}
        for group in self.layout.groups(self.layer):
            method = self.choices.method(self.prefix, group)
            seen = statistics[group.name] if self.walk.stream("calibration", "bf16") else None
            input_scale = self._input_scale(group, seen)
            sources = {name: self._source(name) for name in group.linears}
            targets = sources
            if self.prefix + group.linears[0] in self.choices.too_wide:
                self.output.events.append({"event": "too wide to be compensated: replay", "group": group.name})
            if seen is not None and method.needs_hessian:
                seen.hessian = self._new_hessian(group)
                before = linears, input_scale, seen.hessian, self.states.source
                if method.compensates:
                    targets = self._compensate(group, whole, sources, *before)
                else:
                    self._observe_inputs(group, *before)
            for name in group.linears:
                del self.weights[f"{name}.weight"]
            # What is prepared holds the Hessian's memory, so it is not to outlive the call.
            quantized = quantize_by_rows(
                targets, sources, method.prepare_group(targets, seen, self.output.events), self.walk.ranks
            )
            for name, (weight, error) in quantized.items():
                linears[name] = QuantizedLinear(weight, input_scale)
                measured[name] = {"weight_error": error}
                if seen is not None:
                    measured[name] |= {"input_amax": float(seen.amax), "tokens": seen.tokens}
            if seen is not None:
                seen.hessian = None
        return linears

    def _input_scale(self, group: LinearGroup, seen: InputStatistics | None) -> Tensor | None:
        if seen is None or self.choices.scheme(self.prefix, group) != "NVFP4":
            return None
        if seen.amax == 0:
            self.output.events.append({"event": "input is always zero", "group": group.name})
        return input_global_scale(seen, self.settings.input_headroom)

    def _source(self, linear: str) -> Tensor:
        weight = self.weights[f"{linear}.weight"]
        assert isinstance(weight, Tensor)
        return weight

    def _new_hessian(self, group: LinearGroup) -> HessianAccumulator:
        columns = self.layout.shapes[f"{self.prefix}{group.linears[0]}.weight"][1]
        ranks = self.walk.ranks
        return HessianAccumulator(columns, self.walk.device, own=(ranks.turn, ranks.size))

    def _observe_inputs(
        self,
        group: LinearGroup,
        linears: Mapping[str, QuantizedLinear],
        input_scale: Tensor | None,
        hessian: HessianAccumulator,
        source: HiddenFile,
    ) -> None:
        """Fills `hessian` with XᵀX of what the group's Linears will multiply, all before it being quantized."""
        stream = self.walk.stream("calibration", "nvfp4")
        assert stream is not None
        observers = Observers({group.name: hessian}, then_stop=True)
        with self._quantized_layer(linears, {group.name: observers.site(group.name, to_nvfp4(input_scale))}) as lane:
            self.walk.watch(lane, stream.batches, source, observers)
        self.walk.ranks.fill(hessian.summed_blocks())

    def _compensate(
        self,
        group: LinearGroup,
        whole: Mapping[str, Tensor | QuantizedWeight],
        sources: Mapping[str, Tensor],
        linears: Mapping[str, QuantizedLinear],
        input_scale: Tensor | None,
        hessian: HessianAccumulator,
        source: HiddenFile,
    ) -> dict[str, Tensor]:
        """The group's weights, `sources`, with what they make up for; fills `hessian` as `_observe_inputs` does.

        `whole` are the layer's tensors as the bf16 lane has them.
        """
        with ExitStack() as layers:

            def tapped(lane: Lane) -> TappedLane:
                tap = GroupTap(group, input_scale if lane == "nvfp4" else None)
                sites = {group.name: tap.site}
                if lane == "bf16":
                    layer = LaneLayer(self.walk.skeleton, self.layer, whole, self.walk.dtype, sites)
                else:
                    layer = self._quantized_layer(linears, sites, lane)
                return TappedLane(lane, layers.enter_context(layer), tap)

            served = [tapped(lane) for lane in SERVED if self.walk.stream("calibration", lane)]
            lanes = GroupLanes(self.walk, source, sources, tapped("bf16"), served)
            moved, decided = compensate_group(lanes, hessian, self.settings.seed)
        if decided is not None:
            self.output.measures.setdefault("compensation", {})[group.name] = decided
        return moved

    def _propagate(self, linears: Mapping[str, QuantizedLinear]) -> None:
        """Runs the quantized lanes, and measures how far nvfp4's is from the source's on the probe."""
        for name in SERVED:
            streams = [stream for stream in self.walk.streams if stream.lane == name]
            if streams:
                with self._quantized_layer(linears, lane=name) as lane:
                    for stream in streams:
                        self._run(lane, stream)
        if self.walk.stream("probe", "nvfp4") is not None:
            error = self.walk.relative_error(self.states.target, "probe")
            self.output.measures["hidden_error"] = asdict(error)
            self.output.facts += f"  hidden error {error}"

    def _quantized_layer(
        self,
        linears: Mapping[str, QuantizedLinear],
        sites: Mapping[str, InputSite] | None = None,
        lane: Lane = "nvfp4",
    ) -> LaneLayer:
        """The layer with what is quantized of it by now, as `lane` runs it."""
        where = self.walk, self.layout, self.layer, self.weights
        return quantized_layer(*where, linears, sites, self.output.kv_scales, rounds_inputs=lane == "nvfp4")
