"""Everything that card and page know of a checkpoint, read from its files; what is not there is None or empty.

A figure that no file holds is not known here either, so that nothing published can come from memory. `.fourge` does
not travel with a published directory: of what only the job knows, `fourge.json` keeps the part that does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fourge.checkpoint.folder import CONFIG, INDEX, PROVENANCE
from fourge.errors import InputError
from fourge.evaluation.runs import ROLES, Run
from fourge.evaluation.suites import SUITES
from fourge.progress import format_binary

if TYPE_CHECKING:
    from fourge.plan import PlanReport
    from fourge.walk.job import Manifest

JOB = ".fourge/job.json"
METRICS = ".fourge/metrics.jsonl"
EVALUATIONS = ".fourge/evaluate"
_EVALUATION_KIND = "fourge-evaluation"
_OF_THE_FINGERPRINT = ("fourge", "torch", "transformers")


@dataclass(frozen=True)
class StepMetrics:
    """One step's last entry in metrics.jsonl: seconds, and bytes resident at its end; `entry` is all of it."""

    name: str
    seconds: float
    resident_bytes: int
    entry: Mapping[str, Any]


@dataclass(frozen=True)
class LayerMeasures:
    """What the job measured in one decoder layer.

    `hidden_error` is the quantized lane's relative error after the layer on the probe (`mean`, `standard_error`,
    `tokens`), None without a probe; `linears` has `weight_error`, `input_amax`, … by the Linear's name in the layer.
    """

    layer: int
    hidden_error: Mapping[str, Any] | None
    linears: Mapping[str, Mapping[str, Any]]
    events: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class StoredEvaluation:
    """One finished evaluation: its folder (samples lie in `baseline/` and `quantized/`), and `evaluation.json`.

    `place` is the folder below `.fourge/evaluate`: the benchmark's, or in that one of its thinking mode. `results` are
    lm-eval's own of this model, empty where they are not there.
    """

    folder: Path
    place: PurePosixPath
    content: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def file(self) -> str:
        """Where in the checkpoint directory its figures are from."""
        return f"{EVALUATIONS}/{self.place}/evaluation.json"

    @property
    def name(self) -> str:
        """The suite, and how much of it; where tasks were named one by one, they. With the thinking mode, if any."""
        suite = self.content["suite"]
        benchmark = self.place.parts[0].replace("+", ", ") if suite is None else str(suite)
        if suite in SUITES and len(self.content["tasks"]) < len(SUITES[suite].tasks):
            benchmark += f" ({len(self.content['tasks'])} of its {len(SUITES[suite].tasks)} tasks)"
        thinking = self.content["settings"].get("thinking")
        return benchmark if thinking is None else f"{benchmark}, thinking {thinking}"

    def asked(self, task: str) -> tuple[int, int] | None:
        """How many items of a task or group were asked, and how many it has; None where lm-eval did not say."""
        counted = self.results.get("n-samples", {})
        leaves = Run("", {}, dict.fromkeys(counted, self.results)).leaves(task)
        if not all(leaf in counted for leaf in leaves):
            return None
        return sum(counted[leaf]["effective"] for leaf in leaves), sum(counted[leaf]["original"] for leaf in leaves)

    def items_text(self, task: Mapping[str, Any]) -> str:
        """`24 of 1,000` of one of `content`'s tasks, where a limit left items out; empty without items."""
        asked = self.asked(task["task"]) if self.is_subset(task["task"]) else None
        whole = "" if asked is None else f" of {asked[1]:,}"
        return f"{task['items']:,}{whole}" if task["items"] else ""

    def is_subset(self, task: str) -> bool:
        """Whether a limit left items of a task out, by lm-eval's count; without that, by the settings."""
        asked, settings = self.asked(task), self.content["settings"]
        if asked is None:
            return settings["limit"] is not None or task in (settings.get("limits") or {})
        return asked[0] < asked[1]


@dataclass(frozen=True)
class WeightFiles:
    """The files of weights, to the byte, as they lie in the directory."""

    count: int
    nbytes: int


@dataclass(frozen=True)
class Evidence:
    """What the files of the checkpoint directory `output` say.

    `index`, `job` and `provenance` are None where there is no such file. `plan` is None where the checkpoint cannot
    be planned for; `plan_failure` then says why. `weights` is None where no weight file is there.
    """

    output: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    job: "Manifest | None"
    metrics: tuple[StepMetrics, ...]
    provenance: Mapping[str, Any] | None
    evaluations: tuple[StoredEvaluation, ...]
    plan: "PlanReport | None"
    plan_failure: str | None
    weights: WeightFiles | None

    @property
    def machines(self) -> tuple[str, ...]:
        """The machines that the steps ran on, each once, in words; a job may be continued on another."""
        described = [step.entry["machine"] for step in self.metrics if "machine" in step.entry]
        return tuple(dict.fromkeys(machine_text(machine) for machine in described))

    @property
    def peaks(self) -> tuple[tuple[str, int], ...]:
        """The highest memory of the run's processes, by what it was measured of; empty where none was."""
        read = {"resident": "peak_resident_bytes", "on the GPU": "peak_gpu_bytes"}
        found = {what: [step.entry[key] for step in self.metrics if key in step.entry] for what, key in read.items()}
        return tuple((what, max(values)) for what, values in found.items() if values)

    @property
    def record(self) -> str | None:
        """The file that the properties below are from: `fourge.json`, which is published, else the job's manifest."""
        if self.provenance is not None:
            return PROVENANCE
        return None if self.job is None else JOB

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """The resolved settings of the run."""
        if self.provenance is None and self.job is not None:
            return self.job.settings
        return self._object("settings")

    @property
    def versions(self) -> Mapping[str, str] | None:
        """Software versions by name; `fourge.json` knows more of them than the job's fingerprint."""
        if self.provenance is not None:
            known: Mapping[str, str] = self.provenance["versions"]
            return known
        if self.job is None:
            return None
        return {name: self.job.fingerprint[name] for name in _OF_THE_FINGERPRINT if name in self.job.fingerprint}

    @property
    def data(self) -> Mapping[str, Any] | None:
        """The token sets' provenance: sequences, tokens, digests; None for a run without data."""
        return self._object("data")

    @property
    def fidelity(self) -> Mapping[str, Any] | None:
        """The job's own probe: `kl_div`, `top1_agreement`, `perplexity_bf16`, `perplexity_nvfp4`, each an estimate."""
        return self._object("fidelity")

    @property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        """What the run did other than asked, each with its `step`."""
        return tuple(self._result("events") or ())

    @property
    def layers(self) -> tuple[LayerMeasures, ...]:
        """Decoder layers in order, as the manifest has them; empty without one."""
        if self.job is None:
            return ()
        return tuple(
            LayerMeasures(
                layer=step - 1,
                hidden_error=record.measures.get("hidden_error"),
                linears=record.measures["linears"],
                events=tuple(record.events),
            )
            for step, record in enumerate(self.job.records)
            if "linears" in record.measures
        )

    def _object(self, key: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self._result(key)
        return found

    def _result(self, key: str) -> Any:
        if self.provenance is not None:
            return self.provenance.get(key)
        return None if self.job is None or self.job.result is None else self.job.result.get(key)


def machine_text(machine: Mapping[str, Any]) -> str:
    """`AMD EPYC 7B13, 2 logical CPUs, 24.0 GiB of memory`, and the GPU where there was one."""
    cpus = "1 logical CPU" if machine["cpus"] == 1 else f"{machine['cpus']} logical CPUs"
    parts = [machine["cpu"], cpus, f"{format_binary(machine['memory_bytes'])} of memory"]
    if "gpu" in machine:
        parts.append(f"{machine['gpu']} with {format_binary(machine['gpu_memory_bytes'])}")
    return ", ".join(parts)


def read_evidence(output: Path) -> Evidence:
    """Reads everything that `output` holds about itself: JSON files and headers, no weights, nothing from a network.

    Raises InputError where `output` is no directory, has no config.json, or one of the files is damaged.
    """
    from fourge.walk.job import read_manifest

    if not output.is_dir():
        raise InputError(f"{output}: no such directory; give the one that `fourge quantize` wrote")
    if not (output / CONFIG).is_file():
        raise InputError(f"{output}: has no {CONFIG}: not a finished checkpoint; run `fourge quantize` to its end")
    report, failure = _plan(output)
    return Evidence(
        output=output,
        config=_read_object(output / CONFIG),
        index=_read_object(output / INDEX) if (output / INDEX).is_file() else None,
        job=read_manifest(output) if (output / JOB).is_file() else None,
        metrics=read_metrics(output / METRICS),
        provenance=_read_object(output / PROVENANCE) if (output / PROVENANCE).is_file() else None,
        evaluations=_read_evaluations(output / EVALUATIONS),
        plan=report,
        plan_failure=failure,
        weights=_weigh(output),
    )


def _plan(output: Path) -> "tuple[PlanReport | None, str | None]":
    from fourge.plan import plan

    try:
        return plan(str(output), device="cpu", no_probe=True), None
    except InputError as error:  # another architecture's or tool's checkpoint: it has a card all the same
        return None, str(error)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); copy it again from where it was written") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (no JSON object); copy it again from where it was written")
    return content


def read_metrics(path: Path) -> tuple[StepMetrics, ...]:
    """The last entry of every step, in the order of steps: what a killed run did is done again by the next."""
    if not path.is_file():
        return ()
    last: dict[int, StepMetrics] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            last[entry["step"]] = StepMetrics(entry["name"], entry["seconds"], entry["resident_bytes"], entry)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: line {number} is damaged ({error}); delete the line") from error
    return tuple(last[step] for step in sorted(last))


def _read_evaluations(folder: Path) -> tuple[StoredEvaluation, ...]:
    """Finished evaluations of ours, by folder name; one that is under way has no evaluation.json yet.

    `--thinking both` keeps each mode in a folder of its own, in the benchmark's.
    """
    paths = sorted(path for pattern in ("*", "*/thinking-*") for path in folder.glob(f"{pattern}/evaluation.json"))
    found = []
    for path in paths:
        results = path.parent / ROLES[1] / "results.json"
        recorded = _read_object(results) if results.is_file() else {}
        place = PurePosixPath(path.parent.relative_to(folder))
        found.append(StoredEvaluation(path.parent, place, _read_object(path), recorded))
    for evaluation in found:
        kind = evaluation.content.get("kind")
        if kind != _EVALUATION_KIND:
            raise InputError(f"{evaluation.folder}/evaluation.json is of kind {kind!r}; evaluate again, or delete it")
    return tuple(found)


def _weigh(output: Path) -> WeightFiles | None:
    sizes = [path.stat().st_size for path in output.glob("*.safetensors")]
    return WeightFiles(len(sizes), sum(sizes)) if sizes else None
