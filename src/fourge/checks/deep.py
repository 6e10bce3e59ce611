"""Both lanes over held-out tokens, from the files: what an engine would compute, beside the source."""

import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fourge.checkpoint.layout import Layout, plan_layout
from fourge.checkpoint.reader import Checkpoint
from fourge.checks.expected import Expected
from fourge.checks.probe import DeepOptions, Probe
from fourge.checks.report import Check, conclude, skipped
from fourge.errors import InputError
from fourge.progress import WalkProgress, format_bytes
from fourge.walk.head import Fidelity
from fourge.walk.hidden import HiddenFile
from fourge.walk.lanes import read_layer
from fourge.walk.layer import LaneLayer
from fourge.walk.quantized import QuantizedModel
from fourge.walk.skeleton import Skeleton, load_config
from fourge.walk.statistics import Estimate
from fourge.walk.streams import lay_out
from fourge.walk.walk import Walk

MOST_KL_DIV = 1.0
"""Nats a token. A model that far from its source is of no use, whether the files are damaged or not."""

_RELATIVE_TOLERANCE = 0.01
_ABSOLUTE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class DeepResult:
    """What the walk found; `fidelity` is None when it did not get to the head."""

    check: Check
    fidelity: dict[str, Any] | None
    hidden_errors: list[dict[str, Any]]


def walk_deep(
    checkpoint: Checkpoint, source: Checkpoint, expected: Expected, probe: Probe, options: DeepOptions
) -> DeepResult:
    """Runs both lanes over the probe; skipped where the source is another model or the walk cannot run the head."""
    device = torch.device(options.device)
    skeleton = Skeleton(load_config(source.directory), expected.architecture, device)
    if skeleton.shapes != expected.shapes:
        return _not_walked("the source's config.json describes another model")
    outside = sorted(expected.quantized.difference(expected.linears))
    if outside:
        return _not_walked(f"{outside[0]} is quantized, which the walk runs in the source's dtype only")
    layout = plan_layout(
        expected.architecture,
        skeleton.num_layers,
        skeleton.shapes,
        source.tensors,
        skeleton.tied_head,
        expected.schemes,
    )
    streams = lay_out(
        [("probe", "bf16", probe.sequences), ("probe", "nvfp4", probe.sequences)], probe.micro_batch_tokens
    )
    walk = Walk(skeleton, source, streams, getattr(torch, options.compute_dtype), device)
    quantized = QuantizedModel(checkpoint, layout, expected.kv_cache_scheme)
    return DeepWalk(walk, layout, quantized, probe.recorded).run()


def _not_walked(why: str) -> DeepResult:
    return DeepResult(skipped("deep", why), None, [])


class _LaneError(Exception):
    """The nvfp4 lane could not be run to the end; the message says why."""


@dataclass(frozen=True)
class DeepWalk:
    """A walk that only looks. `recorded` is the KL that the job measured on these tokens, None without one."""

    walk: Walk
    layout: Layout
    quantized: QuantizedModel
    recorded: float | None

    def run(self) -> DeepResult:
        """Walks layer by layer, hidden states in the system's temporary directory."""
        errors: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(prefix="fourge-verify-") as name:
            self._require_room(Path(name))
            try:
                fidelity = self._walk(Path(name), errors)
            except _LaneError as failure:
                return DeepResult(conclude("deep", "both lanes", [str(failure)]), None, errors)
        check = judge(fidelity, self.recorded)
        return DeepResult(check, asdict(fidelity) if math.isfinite(fidelity.kl_div.mean) else None, errors)

    def _require_room(self, folder: Path) -> None:
        need, free = 2 * self.walk.hidden_layout.nbytes, shutil.disk_usage(folder).free
        if free < need:
            raise InputError(
                f"{folder.parent}: --deep needs {format_bytes(need)} for hidden states, {format_bytes(free)} are "
                "free; set TMPDIR to a larger place, or lower --num-probe-samples and --max-seq-length"
            )

    def _walk(self, folder: Path, errors: list[dict[str, Any]]) -> Fidelity:
        walk, layers = self.walk, self.layout.num_layers
        with WalkProgress("verify --deep", self.layout.num_steps) as progress:
            with HiddenFile(folder / "layer 0", walk.hidden_layout, create=True) as target:
                walk.embed(target, lambda share, tokens: progress.advance(share, tokens=tokens))
            progress.finish_step(self.layout.step_name(0), "", {})
            for layer in range(layers):
                before = folder / f"layer {layer}"
                with (
                    HiddenFile(before, walk.hidden_layout, create=False) as source,
                    HiddenFile(folder / f"layer {layer + 1}", walk.hidden_layout, create=True) as target,
                ):
                    error = self._layer(layer, source, target, progress)
                before.unlink()
                errors.append({"layer": layer} | asdict(error))
                progress.finish_step(self.layout.step_name(layer + 1), f"hidden error {error}", {})
            with HiddenFile(folder / f"layer {layers}", walk.hidden_layout, create=False) as source:
                fidelity = walk.fidelity(source, "probe", lambda share, _: progress.advance(share))
            progress.finish_step(self.layout.step_name(layers + 1), f"KL {fidelity.kl_div}", {})
        return fidelity

    def _layer(self, layer: int, source: HiddenFile, target: HiddenFile, progress: WalkProgress) -> Estimate:
        """One layer through both lanes, one after the other: each lane's weights are let go before the next's."""
        bf16, nvfp4 = self.walk.stream("probe", "bf16"), self.walk.stream("probe", "nvfp4")
        assert bf16 is not None and nvfp4 is not None

        def advance(share: float, tokens: int) -> None:
            progress.advance(share / 2, tokens=tokens)

        weights = read_layer(self.walk, self.layout, layer, progress)
        with LaneLayer(self.walk.skeleton, layer, weights, self.walk.dtype) as lane:
            self.walk.run(lane, bf16, source, target, advance)
        del weights
        lane = self.quantized.layer(self.walk, layer, progress)
        try:
            with lane:
                self.walk.run(lane, nvfp4, source, target, advance)
        except InputError as error:
            raise _LaneError(str(error)) from error
        return self.walk.relative_error(target, "probe")


def judge(fidelity: Fidelity, recorded: float | None) -> Check:
    """Whether the measured KL is one that a sound NVFP4 checkpoint can have, and the one that was recorded.

    The quantizing run walked the same tokens with the same weights, so on the same machine the KL comes out the
    same to the last bit. Another number of threads or another CPU splits sums differently, and a sum that ends on
    the other side of a rounding boundary moves an activation by a whole E2M1 step: hence 1 % and a millionth of a
    nat, which noise stays below and damage does not.
    """
    kl = fidelity.kl_div.mean
    failures = []
    if not math.isfinite(kl):
        failures.append(f"KL(BF16‖NVFP4) is {kl}")
    elif kl > MOST_KL_DIV:
        failures.append(f"KL(BF16‖NVFP4) is {kl:.4g} nats a token, above {MOST_KL_DIV:g}")
    detail = f"both lanes over {fidelity.kl_div.tokens:,} held-out tokens: KL {fidelity.kl_div}"
    if recorded is not None:
        detail += f", the job recorded {recorded:.5g}"
        if not math.isclose(kl, recorded, rel_tol=_RELATIVE_TOLERANCE, abs_tol=_ABSOLUTE_TOLERANCE):
            failures.append(f"KL(BF16‖NVFP4) is {kl:.6g} nats a token, the job recorded {recorded:.6g}")
    return conclude("deep", detail, failures)
