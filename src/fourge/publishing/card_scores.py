"""What the model kept: the job's own probe, and benchmark scores of both models, with errors that pairing gives."""

from collections.abc import Mapping, Sequence
from typing import Any

from fourge.progress import format_bytes, format_seconds
from fourge.publishing.card_details import calibration_text
from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_reference import Reference
from fourge.publishing.card_section import Section, Trace
from fourge.publishing.evidence import StoredEvaluation, machine_text
from fourge.publishing.markdown import NONE, bullets, code, estimate, percent, plain, shared_command, table
from fourge.report.evaluation_text import joined_notes, shown_recovery

_Tasks = Sequence[Mapping[str, Any]]
_MEASURES = (
    ("KL(BF16‖NVFP4), nats a token", "kl_div", 4),
    ("Top-1 agreement", "top1_agreement", 4),
    ("Perplexity, base model", "perplexity_bf16", 3),
    ("Perplexity, this model", "perplexity_nvfp4", 3),
    ("Difference of the mean log-likelihoods", "nll_difference", 4),
)


def fidelity(card: CardFacts) -> Section:
    """How far the two models' next-token distributions are apart on held-out text."""
    found = card.evidence.fidelity
    if found is None:
        again = "`fourge verify OUT --source BASE --deep --probe TEXT` measures it, and `fourge quantize` records it."
        return Section(
            "Fidelity", f"Not measured: no record of a probe is here. {again}", missing="a probe by fourge quantize"
        )
    rows = [[name, estimate(found[key], digits)] for name, key, digits in _MEASURES if key in found]
    tokens = found["kl_div"]["tokens"]
    intro = (
        f"Both models ran over the same {tokens:,} held-out tokens{_probe_source(card)}, this one with weights and "
        "activations rounded as its scheme says. ± is one standard error."
    )
    assert card.evidence.record is not None
    trace = Trace("KL, top-1, perplexities", card.evidence.record, "fourge quantize")
    return Section("Fidelity", f"{intro}\n\n{table(('measure', 'value'), rows)}", (trace,))


def _probe_source(card: CardFacts) -> str:
    data = card.evidence.data
    if data is None:
        return ""
    if data["probe_source"] is None:
        return f" of {calibration_text(data)}"
    return f" of {plain(str(data['probe_source']).rstrip('/').rpartition('/')[2])}"


def evaluation(card: CardFacts) -> Section:
    """Every finished evaluation: a table of both models' scores, its settings, and scores from elsewhere."""
    evaluations = card.evidence.evaluations
    if not evaluations:
        command = card.fourge("evaluate", "OUT", "--baseline", card.base_model or "BASE", "--suite", "openllm-v1")
        body = f"Not evaluated yet. This measures both models:\n\n{code(command)}"
        return Section("Evaluation", body, missing=command)
    parts = [_INTRO]
    for found in evaluations:
        parts += _one_evaluation(found, card.options.references)
    return Section("Evaluation", "\n\n".join(parts), _traces(card))


_INTRO = (
    "Scores in percent, with lm-evaluation-harness, both models on the same items. Δ and recovery (this model's score "
    "over the base model's) have paired standard errors; lost and won count the items that one model alone got right. "
    "A task at chance has no recovery: the means count it, too."
)


def shots(found: StoredEvaluation, task: Mapping[str, Any]) -> int | None:
    """The shots of a task; of a group, which has none of its own, as its suite sets them."""
    from fourge.evaluation.suites import SUITES

    if task["num_fewshot"] is not None or found.content["suite"] not in SUITES:
        known: int | None = task["num_fewshot"]
        return known
    suite = SUITES[found.content["suite"]]
    return next((one.num_fewshot for one in suite.tasks if one.task == task["task"]), None)


def _one_evaluation(found: StoredEvaluation, references: Sequence[Reference]) -> list[str]:
    content = found.content
    title = f"### {plain(found.name)}"
    tasks = [task | {"num_fewshot": shots(found, task)} for task in content["tasks"]]
    used = [reference for reference in references if any(task["task"] in reference.scores for task in tasks)]
    rows = [_task_row(found, task, tasks, used) for task in tasks]
    for key, name in (("macro", "mean of tasks"), ("item_weighted", "mean of items")):
        if content[key] is not None:
            rows.append(_mean_row(name, content[key], tasks, len(used)))
    header = ("task", "shots", "metric", "items", "base model", "this model", "Δ", "recovery %", "lost", "won")
    parts = [title, table((*header, *(plain(reference.name) for reference in used)), rows)]
    notes = [f"{plain(note)}." for note in joined_notes(tasks)]
    notes += [line for reference in used for line in _reference_notes(reference, tasks, content["settings"])]
    notes += _per_token(content)
    return [*parts, *([bullets(notes)] if notes else []), _settings(content), code(shared_command(content["command"]))]


def _task_row(found: StoredEvaluation, task: Mapping[str, Any], tasks: _Tasks, used: Sequence[Reference]) -> list[str]:
    metric = task["metric"] if task["filter"] == "none" else f"{task['metric']} ({task['filter']})"
    shots_text = NONE if task["num_fewshot"] is None else str(task["num_fewshot"])
    flips = [NONE if task[key] is None else str(task[key]) for key in ("only_baseline", "only_quantized")]
    row = [task["task"], shots_text, metric, found.items_text(task) or NONE, *_scores(task, tasks), *flips]
    return row + [_reference_cell(reference, task, found.content["settings"]) for reference in used]


def _mean_row(name: str, mean: Mapping[str, Any], tasks: _Tasks, references: int) -> list[str]:
    label = f"{name} ({mean['tasks']})"
    return [label, "", "", f"{mean['items']:,}", *_scores(mean, tasks), "", "", *[""] * references]


def _scores(found: Mapping[str, Any], tasks: _Tasks) -> list[str]:
    both = [NONE if found[key] is None else percent(found[key]["score"], found[key]["se"]) for key in _LANES]
    delta, recovery = found["delta"], shown_recovery(found, tasks)
    return [
        *both,
        NONE if delta is None else percent(delta["value"], delta["se"], signed=True),
        NONE if recovery is None else percent(recovery["value"], recovery["se"]),
    ]


_BESIDE = " and quantized/results.json beside it"
_LANES = ("baseline", "quantized")


def _reference_cell(reference: Reference, task: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if task["task"] not in reference.scores:
        return NONE
    score = percent(reference.scores[task["task"]]["score"], None)
    return f"{score} (not comparable)" if reference.differences(task, settings) else score


def _reference_notes(
    reference: Reference, tasks: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[str]:
    lines = [f"{plain(reference.name)}: {plain(reference.source)}, as given in {plain(reference.file)}."]
    for task in tasks:
        why = reference.differences(task, settings) if task["task"] in reference.scores else []
        if why:
            lines.append(f"{plain(reference.name)}, {task['task']}: not comparable ({plain('; '.join(why))}).")
    return lines


def _per_token(content: Mapping[str, Any]) -> list[str]:
    found = content["per_token"]
    if found is None:
        return []
    kl_div, agreement = found["kl_div"], found["top1_agreement"]
    return [
        f"Over the tokens of these tasks: KL {estimate(kl_div)} nats a token, top-1 agreement {estimate(agreement)}."
    ]


def _settings(content: Mapping[str, Any]) -> str:
    engine, settings = content["engine"], content["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
    told = [f"{name} {plain(str(value))}" for name, value in settings.items() if value not in (None, {}, [])]
    cost, machine = content["cost"], content.get("machine")
    where = "" if machine is None else f" ({plain(machine_text(machine))})"
    return (
        f"Engine {engine['name']}, {engine['numerics']}, {engine['compute_dtype']} on {engine['device']}{where}; "
        f"{', '.join(told)}; {versions}; took {format_seconds(cost['seconds'])}, peak memory "
        f"{format_bytes(cost['peak_resident_bytes'])}; {content['created'][:10]}:"
    )


def _traces(card: CardFacts) -> tuple[Trace, ...]:
    traces = [
        Trace(f"scores, {plain(found.name)}", f"{found.file}{_BESIDE if found.results else ''}", "fourge evaluate")
        for found in card.evidence.evaluations
    ]
    given = [Trace(f"scores, {plain(one.name)}", plain(one.file), "given by hand") for one in card.options.references]
    return (*traces, *given)
