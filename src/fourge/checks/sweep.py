"""One pass over the tensors, layer by layer: every check that looks at values, from one reading of the files."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fourge.checkpoint.compressed_tensors import WEIGHT_PARTS
from fourge.checkpoint.reader import Checkpoint
from fourge.checks.expected import Expected
from fourge.checks.folded import FoldedSource
from fourge.checks.report import Check, conclude, count
from fourge.checks.source import allowed_error, measure_group, unquantized_failures
from fourge.checks.values import fused_failures, scalar_failures, scale_failures
from fourge.progress import WalkProgress


@dataclass
class _Found:
    """What the pass has found so far, by check."""

    scales: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)
    dequantized: list[str] = field(default_factory=list)
    compared: int = 0
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Linear → its relative error and the max method's."""

    @property
    def total(self) -> int:
        return len(self.scales) + len(self.fused) + len(self.unquantized) + len(self.dequantized)


@dataclass(frozen=True)
class Sweep:
    """The pass over `checkpoint`, beside `source` where there is one. `damage` is wrong with how the source is read.

    `sound` names the tensors that are there with the right dtype and shape; the others were reported by
    `check_tensors` and are passed over. `moved` is how far the method may have moved which Linears' weights.
    """

    checkpoint: Checkpoint
    source: FoldedSource | None
    expected: Expected
    sound: Collection[str]
    damage: Sequence[str] = ()
    moved: Mapping[str, float] = field(default_factory=dict)

    def run(self) -> list[Check]:
        """The checks `scales` and `fused_groups`; with a source also `unquantized` and `dequantized`."""
        found = _Found(unquantized=list(self.damage))
        layers = self.expected.num_layers
        with WalkProgress("verify", layers + 1) as progress:
            for layer in range(layers):
                self._look(self.expected.layer_names(layer), self.expected.quantized_groups(layer), found, progress)
                found.scales += scalar_failures(self.checkpoint, self.expected.kv_scale_names(layer), self.sound)
                found.fused += fused_failures(self.checkpoint, self.expected, layer, self.sound)
                progress.finish_step(f"layer {layer}", f"{found.total} failures so far", {})
            outside = sorted(self.expected.quantized.difference(self.expected.linears))
            self._look(self.expected.outer_names(), [(linear,) for linear in outside], found, progress)
            progress.finish_step("embedding and head", f"{found.total} failures", {})
        return self._conclude(found)

    def _look(self, names: list[str], groups: list[tuple[str, ...]], found: _Found, progress: WalkProgress) -> None:
        """One layer's tensors `names`, its quantized Linears in `groups`."""
        for group in groups:
            before = self._bytes_read
            for linear in group:
                found.scales += scale_failures(self.checkpoint, linear, self.expected.schemes[linear], self.sound)
            if self.source is not None:
                self._measure(self.source, group, found)
            progress.advance(len(group) / len(names), read=self._bytes_read - before)
        if self.source is None:
            return
        for name in names:
            if self._is_kept(name):
                before = self._bytes_read
                found.unquantized += unquantized_failures(self.checkpoint, self.source, self.expected, name)
                found.compared += 1
                progress.advance(1 / len(names), read=self._bytes_read - before)

    def _measure(self, source: Checkpoint, group: tuple[str, ...], found: _Found) -> None:
        comparable = []
        for linear in group:
            name = f"{linear}.weight"
            there = source.tensors.get(name)
            if there is None:
                found.dequantized.append(f"{name} is not in the source")
            elif there.shape != self.expected.shapes[name]:
                expected = list(self.expected.shapes[name])
                found.dequantized.append(f"{name} has shape {list(there.shape)} in the source, {expected} here")
            elif all(f"{linear}.{part}" in self.sound for part in WEIGHT_PARTS[self.expected.schemes[linear]]):
                comparable.append(linear)
        for linear, error, reference in measure_group(self.checkpoint, source, comparable, self.expected.schemes):
            found.errors[linear] = (error, reference)
            if not error <= allowed_error(reference, self.moved.get(linear, 0.0)):  # a NaN fails too
                stored = WEIGHT_PARTS[self.expected.schemes[linear]][0]
                found.dequantized.append(
                    f"{linear}.{stored}: relative error {error:.4f}, where max calibration gives {reference:.4f}"
                )

    def _is_kept(self, name: str) -> bool:
        """Whether a tensor is there and one of the source's; a weight in FP8 goes by the source's name."""
        quantized = name.removesuffix(".weight") in self.expected.quantized
        return name in self.sound and name in self.expected.shapes and not quantized

    @property
    def _bytes_read(self) -> int:
        return self.checkpoint.bytes_read + (0 if self.source is None else self.source.bytes_read)

    def _conclude(self, found: _Found) -> list[Check]:
        quantized = count(len(self.expected.quantized), "Linear")
        if self.expected.kv_cache_scheme is not None:
            quantized += " and of the KV cache"
        checks = [
            conclude("scales", f"every scale of {quantized}: finite and above 0", found.scales),
            conclude("fused_groups", f"global scales of {self._fused_groups()}", found.fused),
        ]
        if self.source is not None:
            compared = f"{count(found.compared, 'tensor')} against the source's bytes"
            if self.source.scalings:
                compared += f"; {count(len(self.source.scalings), 'tensor')} of the source times recorded powers of two"
            checks += [
                conclude("unquantized", compared, found.unquantized),
                conclude("dequantized", _errors_text(found.errors), found.dequantized),
            ]
        return checks

    def _fused_groups(self) -> str:
        layers = range(self.expected.num_layers)
        fused = sum(len(group) > 1 for layer in layers for group in self.expected.quantized_groups(layer))
        return count(fused, "fused group")


def _errors_text(errors: dict[str, tuple[float, float]]) -> str:
    if not errors:
        return "no Linear could be compared"
    mean = sum(error for error, _ in errors.values()) / len(errors)
    worst = max(errors, key=lambda linear: errors[linear][0])
    return (
        f"relative error of {count(len(errors), 'Linear')}: mean {mean:.4f}, "
        f"largest {errors[worst][0]:.4f} ({worst}; max calibration gives {errors[worst][1]:.4f})"
    )
