"""One walk of `fourge sensitivity`, from a request that headers show to be possible to the damages of every layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fourge.checkpoint.compressed_tensors import tensor_specs
from fourge.checkpoint.writer import num_bytes
from fourge.errors import InputError
from fourge.methods import METHODS, find_method
from fourge.mixing.damage import LayerTrial
from fourge.progress import WalkProgress, announced
from fourge.settings import LinearScheme, QuantizeSettings
from fourge.walk.hidden import HiddenFile
from fourge.walk.machine import describe_machine
from fourge.walk.model import require_finite_ends
from fourge.walk.ranks import join_ranks
from fourge.walk.resources import Needs, micro_batch_bytes, require_resources
from fourge.walk.run import QuantizeRun
from fourge.walk.streams import lay_out
from fourge.walk.walk import Walk
from fourge.walk.walk_folder import WalkFolder

FOLDER = "walk"
_TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class SensitivityRun:
    """A validated request. `quantizing` is the run that the same settings would make; nothing of it is written."""

    quantizing: QuantizeRun
    output: Path

    @classmethod
    def prepare(cls, settings: QuantizeSettings, output: Path) -> Self:
        """Reads config and headers; InputError where something cannot be, or `output` holds something else."""
        if settings.calibration == "none":
            raise InputError("--calibration none: damage is measured on text; name some")
        if settings.num_validation_samples < 1:
            raise InputError("--num-validation-samples 0: damage is measured on held-out text; ask for 1 or more")
        if find_method(settings.method).needs_hessian:
            known = ", ".join(name for name, method in METHODS.items() if not method.needs_hessian)
            raise InputError(f"--method {settings.method}: damage is measured by methods without a Hessian: {known}")
        quantizing = QuantizeRun.prepare(settings, output, join_ranks(settings.device))
        if output.exists() and not output.is_dir():
            raise InputError(f"{output} is a file; name a new directory with -o")
        if output.is_dir() and any(output.iterdir()) and not _is_ours(output / FOLDER):
            raise InputError(f"{output} holds other files and no walk of ours; name a new directory with -o")
        return cls(quantizing, output)

    @contextmanager
    def open_folder(self, restart: bool) -> Iterator[WalkFolder]:
        """The walk's folder, held; given back without a trace where nothing came of it."""
        folder = WalkFolder(self.output / FOLDER, self.quantizing.fingerprint() | {"verb": "sensitivity"})
        with folder.open(restart=restart):
            try:
                yield folder
            except BaseException:
                if folder.next_step == 0 and not (folder.folder / _TOKENS).exists():
                    folder.discard()
                raise

    def work(self, folder: WalkFolder) -> None:
        """Walks the layers that are left; a finished walk is left as it is."""
        if folder.result is not None:
            return
        run = self.quantizing
        if folder.next_step == 0:
            with announced("Checking embedding and head for NaN and Inf"):
                require_finite_ends(run.source, run.layout)
        run.render_sets(folder.folder / _TOKENS)
        sets = run.read_sets(folder.folder / _TOKENS)
        assert sets is not None
        chosen = [("calibration", sets.calibration.sequences), ("validation", sets.validation.sequences)]
        streams = lay_out([(name, "bf16", found) for name, found in chosen], run.settings.micro_batch_tokens)
        walk = Walk(run.skeleton, run.source, streams, run.dtype, run.device)
        if folder.next_step:
            folder.check_hidden(walk.hidden_layout)
        self._require_room(walk, committed=folder.next_step > 0)
        steps = run.layout.num_layers + 1
        costs, about = [0.01] + [1.0] * run.layout.num_layers, {"machine": describe_machine(run.device)}
        with WalkProgress("sensitivity", steps, folder.next_step, folder.metrics_path, None, costs, about) as progress:
            for step in range(folder.next_step, steps):
                self._step(step, walk, folder, progress)
        folder.conclude({"data": sets.provenance})

    def _step(self, step: int, walk: Walk, folder: WalkFolder, progress: WalkProgress) -> None:
        """Runs and commits the embedding (step 0) or a layer."""
        run, measures, facts = self.quantizing, None, ""
        with HiddenFile(folder.hidden_temporary, walk.hidden_layout, create=True) as target:
            if step == 0:
                walk.embed(target, lambda share, tokens: progress.advance(share, tokens=tokens))
            else:
                method = find_method(run.settings.method)
                with HiddenFile(folder.hidden_path(step), walk.hidden_layout, create=False) as source:
                    trial = LayerTrial(walk, run.layout, run.settings, method, step - 1, source, target, progress)
                    measures = trial.run()
                facts = f"damage in {run.settings.scheme} {measures['whole']['mean']:.4g}"
            checksum = target.finish()
        folder.commit_hidden(checksum, measures)
        progress.finish_step(run.layout.step_name(step), facts, {"step": step})

    def _require_room(self, walk: Walk, *, committed: bool) -> None:
        run, hidden = self.quantizing, walk.hidden_layout
        longest = max(batch.count * batch.length for stream in walk.streams for batch in stream.batches)
        layer = max(self._held(layer) for layer in range(run.layout.num_layers))
        needs = Needs(run.device.type, 0, hidden.nbytes, layer, micro_batch_bytes(run.layout, hidden, longest), 0)
        require_resources(needs, self.output, run.device, hidden.nbytes if committed else 0)

    def _held(self, layer: int) -> int:
        """The most that a layer takes: the source's tensors, all of it in FP4, and its largest group in FP8."""
        run = self.quantizing
        prefix = run.layout.architecture.layer_prefix(layer)
        groups = [[prefix + linear for linear in group.linears] for group in run.layout.groups(layer)]
        source = sum(run.source.tensors[name].nbytes for name in run.layout.steps[layer + 1])
        in_fp4 = sum(stored_bytes(run, linear, run.settings.scheme) for group in groups for linear in group)
        in_fp8 = [sum(stored_bytes(run, linear, "FP8") for linear in group) for group in groups]
        return source + in_fp4 + max(in_fp8, default=0)

    def measures(self, folder: WalkFolder) -> list[dict[str, Any]]:
        """Of each decoder layer what `LayerTrial.run` gave, for a finished walk."""
        return folder.measures[1:]


def _is_ours(folder: Path) -> bool:
    """Whether a walk's folder lies there: one that was killed before it wrote anything has a lock, or is empty."""
    return folder.is_dir() and ((folder / "lock").is_file() or not any(folder.iterdir()))


def stored_bytes(run: QuantizeRun, linear: str, scheme: LinearScheme, *, scalars: bool = True) -> int:
    """Bytes of a Linear's weight in `scheme`; without `scalars`, of what grows with the weight alone."""
    rows, columns = run.layout.shapes[f"{linear}.weight"]
    specs = tensor_specs(linear, (rows, columns), scheme, run.source.tensors[f"{linear}.weight"].dtype)
    return sum(num_bytes(dtype, shape) for dtype, shape in specs.values() if scalars or shape != (1,))
