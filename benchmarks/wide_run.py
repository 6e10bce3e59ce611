"""One `fourge quantize` with clocks around the functions of the walk, in a process of its own: see `wide.py`.

    python benchmarks/wide_run.py quantize MODEL -o OUT …

Prints a JSON line. A stage has what the walk itself waited for; what threads do meanwhile is counted apart. On a GPU
every stage begins and ends with what was launched being done, so stages overlap less than they do without clocks.
"""

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

WITH_TOKENS = {
    "bf16 lane": "calibration, validation and probe through the source's layer",
    "nvfp4 lane": "calibration and probe through the quantized layer",
    "up to the groups": "calibration through what is quantized so far, up to each group",
    "Hessians": "XᵀX of each group",
    "hidden states to disk": "fsync",
    "hidden error": "both lanes' probe compared",
}
"""Stages of a layer whose time grows with the number of tokens; that of the others does not."""


class Clocks:
    """Seconds by stage and step of the walk; a stage within another counts there alone."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._within: list[float] = []

    def around(self, owner: Any, name: str, stage: str) -> None:
        """Has `owner.name` add its time to `stage`."""
        self._wrap(owner, name, lambda: self._timing(stage))

    def beside(self, owner: Any, name: str, stage: str) -> None:
        """Likewise for what a thread calls."""
        self._wrap(owner, name, lambda: self._adding(stage))

    def end_step(self, owner: Any, name: str) -> None:
        """Has the seconds of another step begin after every `owner.name`."""
        self._wrap(owner, name, lambda: _then(self.next_step))

    def next_step(self) -> None:
        """Begins the seconds of another step."""
        self.steps.append(dict(self._now))
        listed = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self._now.items())
        print(f"  step {len(self.steps) - 1}: {listed}", file=sys.stderr, flush=True)
        self._now.clear()

    def _wrap(self, owner: Any, name: str, timing: Callable[[], Any]) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with timing():
                return function(*arguments, **options)

        setattr(owner, name, timed)

    @contextmanager
    def _timing(self, stage: str) -> Iterator[None]:
        began = _now()
        self._within.append(0.0)
        try:
            yield
        finally:
            took = _now() - began
            self._now[stage] += took - self._within.pop()
            if self._within:
                self._within[-1] += took

    @contextmanager
    def _adding(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._now[stage] += time.monotonic() - began


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


def main() -> None:
    import typer

    import fourge.cli
    from fourge.methods import curvature_methods, hessian
    from fourge.walk import job, layer_step, run, source_digests, steps, walk, weight_step
    from fourge.walk.one_behind import OneBehind

    class Shards(OneBehind):
        """That of shards: others write behind too."""

    clocks = Clocks()
    clocks.around(run, "require_finite_ends", "embedding and head looked at")
    clocks.around(weight_step.GroupReader, "read", "reading")
    clocks.around(steps, "read_layer", "reading")
    clocks.around(layer_step.LayerStep, "_smooth", "smoothing")
    clocks.around(layer_step.LayerStep, "_run_bf16", "bf16 lane")
    clocks.around(layer_step.LayerStep, "_observe_inputs", "up to the groups")
    clocks.around(hessian.HessianAccumulator, "add", "Hessians")
    clocks.around(curvature_methods, "factorize", "factorization")
    clocks.around(weight_step, "quantize_by_rows", "rounding")
    clocks.around(layer_step, "quantize_by_rows", "rounding")
    clocks.around(layer_step.LayerStep, "_propagate", "nvfp4 lane")
    clocks.around(walk.Walk, "relative_error", "hidden error")
    clocks.around(steps, "finish_together", "hidden states to disk")
    clocks.around(steps.QuantizingWalk, "_entries", "output off the device")
    clocks.around(Shards, "wait", "waiting for the shard")
    steps.OneBehind = Shards  # type: ignore[misc]
    clocks.around(walk.Walk, "fidelity", "head")
    clocks.around(source_digests.SourceDigests, "finish", "waiting for digests")
    clocks.beside(steps, "write_safetensors", "writing, meanwhile")
    clocks.beside(job.Job, "commit", "committing, meanwhile")
    clocks.end_step(steps.QuantizingWalk, "_run_one")
    try:
        fourge.cli.app(sys.argv[1:], standalone_mode=False)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    clocks.next_step()
    moved = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    on_gpu = torch.cuda.is_initialized()
    report = {
        "stages": clocks.steps,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
        "gpu_peak": torch.cuda.max_memory_allocated() if on_gpu else None,
        "gpu_reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
        "read": int(moved["rchar"]),
        "written": int(moved["wchar"]),
        "read_from_disk": int(moved["read_bytes"]),
    }
    print(json.dumps(report))


@contextmanager
def _then(work: Callable[[], None]) -> Iterator[None]:
    yield
    work()


if __name__ == "__main__":
    main()
