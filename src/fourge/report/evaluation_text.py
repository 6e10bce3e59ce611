"""Two models' benchmark scores as a table for people, 120 columns wide; shares as percentages."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fourge.progress import format_bytes, format_seconds
from fourge.report.text import estimate_text

_HEADER = ("task", "items", "baseline", "quantized", "Δ", "recovery %", "p", "Holm p", "lost", "won")
_LINE = 120
_SMALL = 1e-4
"""A p below it is printed as such."""


def evaluation_summary(evaluation: Any) -> str:
    """The table of an evaluation or a comparison, as a dictionary (`evaluation.json`) or a dataclass of that shape.

    A cell without a measurement is empty, and a line below the table says why.
    """
    content = evaluation if isinstance(evaluation, Mapping) else dataclasses.asdict(evaluation)
    lines = [*_head_lines(content), "", *_table_lines(content), ""]
    for task in content["tasks"]:
        lines += _task_lines(task)
    lines += ["", *_closing_lines(content)]
    return "\n".join(part for line in lines for part in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    """A line in lines that fit; what has no spaces, like a path, is left whole."""
    if len(line) <= _LINE:
        return [line]
    return textwrap.wrap(line, _LINE, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _head_lines(content: Mapping[str, Any]) -> list[str]:
    if "runs" in content:
        return [f"{role:<9}  {_run_text(run)}" for role, run in content["runs"].items()]
    engine, settings = content["engine"], content["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
    facts = {
        "chat template": settings["apply_chat_template"],
        "multi-turn shots": settings["fewshot_as_multiturn"],
        "limit": settings["limit"],
        "thinking": settings["thinking"],
        "add_bos_token": settings["add_bos_token"],
        "seed": settings["seed"],
        "system instruction": settings.get("system_instruction"),
    }
    return [
        *(f"{role:<9}  {model['name']}" for role, model in content["models"].items() if model is not None),
        f"engine     {engine['name']}, {engine['numerics']}, {engine['compute_dtype']} on {engine['device']}",
        f"versions   {versions}",
        "settings   " + ", ".join(f"{name} {_setting(value)}" for name, value in facts.items() if value is not None),
    ]


def _run_text(run: Mapping[str, Any]) -> str:
    facts = {"model": run["model"], "engine": run["engine"], "lm-eval": run["lm_eval"]}
    known = [f"{name} {value}" for name, value in facts.items() if value is not None]
    return f"{run['path']} ({', '.join(known) or 'no results recorded beside the samples'})"


def limit_text(limit: float) -> str:
    """`--limit`, which below 1 is a share."""
    return f"the first {limit:.3g} of the items" if limit < 1 else f"the first {limit} items"


def shown_recovery(row: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> Mapping[str, float] | None:
    """The recovery of one of the `tasks`, or of a mean over them; None at chance, for the ratio of two guesses says
    nothing. A mean is at chance where all its tasks are."""
    counted = [row] if "task" in row else [task for task in tasks if task["recovery"] is not None]
    return None if all(task["at_chance"] for task in counted) else row["recovery"]


def joined_notes(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """`hellaswag, sciq: …`: what is to be said of tasks, the same thing once."""
    said: dict[str, list[str]] = {}
    for task in tasks:
        if task["note"]:
            said.setdefault(task["note"], []).append(task["task"])
    return [f"{', '.join(names)}: {note}" for note, names in said.items()]


def _setting(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _table_lines(content: Mapping[str, Any]) -> list[str]:
    rows = [list(_HEADER)]
    for task in content["tasks"]:
        p_values = [_p_text(task[name]) for name in ("mcnemar_p", "holm_p")]
        counts = ["" if task[name] is None else str(task[name]) for name in ("only_baseline", "only_quantized")]
        rows.append([task["task"], str(task["items"] or ""), *_score_cells(task, content["tasks"]), *p_values, *counts])
    for key, name in (("macro", "mean of tasks"), ("item_weighted", "mean of items")):
        mean = content[key]
        if mean is not None:
            cells = _score_cells(mean, content["tasks"])
            rows.append([f"{name} ({mean['tasks']})", str(mean["items"]), *cells, "", "", "", ""])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be, the first as wide as is left: a longer name has a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = min(widths[0], _LINE - sum(2 + width for width in widths[1:]))
    lines = []
    for name, *cells in rows:
        if len(name) > first:
            lines.append(name)
            name = ""
        figures = "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append((name.ljust(first) + figures).rstrip())
    return lines


def _score_cells(row: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        _plus_minus(row["baseline"], "score"),
        _plus_minus(row["quantized"], "score"),
        _plus_minus(row["delta"], "value", "+"),
        _plus_minus(shown_recovery(row, tasks), "value"),
    ]


def _plus_minus(figure: Mapping[str, float] | None, key: str, sign: str = "") -> str:
    if figure is None:
        return ""
    value = f"{100 * figure[key]:{sign}.2f}"
    return value if figure["se"] is None else f"{value} ± {100 * figure['se']:.2f}"


def _p_text(p: float | None) -> str:
    if p is None:
        return ""
    return f"<{_SMALL:.4f}" if p < _SMALL else f"{p:.4f}"


def _task_lines(task: Mapping[str, Any]) -> list[str]:
    """What was scored, how long generated answers are, and why a cell is empty."""
    score = task["metric"] + ("" if task["filter"] in ("none", "") else f" ({task['filter']})")
    facts = [score]
    if task["num_fewshot"] is not None:
        facts.append(f"{task['num_fewshot']} shots")
    if task["version"] is not None:
        facts.append(f"version {task['version']}")
    if task["chance"] is not None:
        facts.append(f"chance {task['chance']:.1%}")
    lines = [f"{task['task']}: {', '.join(facts)}"]
    if task["delta"] is not None and task["mcnemar_p"] is None:
        lines.append("  no p, no flips: the score of an item is not right or wrong")
    if task["generation"] is not None:
        lines.append("  " + _generation_text(task["generation"]))
    if task["note"] is not None:
        lines.append(f"  {task['note']}")
    return lines


def _generation_text(generation: Mapping[str, Any]) -> str:
    sides = (generation["baseline"], generation["quantized"])
    lengths = " and ".join(f"{side['mean_length']:.1f}" for side in sides)
    text = f"answers {lengths} {generation['unit']} long on average, "
    if None in [side["truncated"] for side in sides]:
        return text + "share cut off not known (--tokenizer counts tokens)"
    return text + " and ".join(f"{side['truncated']:.2%}" for side in sides) + " cut off at the limit"


def _closing_lines(content: Mapping[str, Any]) -> list[str]:
    lines = []
    per_token = content.get("per_token")
    if per_token is not None:
        lines += [
            f"KL(BF16‖NVFP4)   {estimate_text(per_token['kl_div'])} nats a token",
            f"top-1 agreement  {estimate_text(per_token['top1_agreement'])}",
        ]
    else:
        lines.append("KL and top-1 agreement per token: not measured (fourge evaluate does, with both models at once)")
    if content["macro"] is None:
        lines.append("means: none (they take two tasks that both models have, scored from 0 to 1)")
    lines += _sharing_lines(content.get("sharing"))
    lines += _drafting_lines(content.get("drafting"))
    lines += contamination_lines(content.get("contamination"))
    if content.get("cost"):
        cost = content["cost"]
        lines.append(
            f"took {format_seconds(cost['seconds'])}, peak memory {format_bytes(cost['peak_resident_bytes'])}, "
            f"{format_bytes(cost['bytes_read'])} read"
        )
    lines += [f"note: {note}" for note in content.get("notes", ())]
    return [*lines, *_LEGEND]


_LEGEND = (
    "Percentages ± one standard error. Δ and recovery are paired, item by item; p is exact McNemar, Holm p over the",
    "tasks. lost: right in the baseline alone; won: right in the quantized model alone.",
)


def _sharing_lines(sharing: Mapping[str, int] | None) -> list[str]:
    if sharing is None:
        return []
    asked, walked = sharing["tokens_requested"], sharing["tokens_walked"]
    return [f"{walked:,} tokens computed of {asked:,} asked for ({1 - walked / asked:.0%} shared)"] if asked else []


def _drafting_lines(drafting: Mapping[str, Any] | None) -> list[str]:
    """How many readings of the weights each model's generated answers took, and what the drafts were worth."""
    lines = []
    for role, made in (drafting or {}).items():
        if made["mean_accepted"] is None:
            lines.append(f"{role} answers: decoded in memory, without passes over the weights")
            continue
        drafted = made["drafted"] / made["verified"]
        lines.append(
            f"{role} answers: {made['passes']} passes over the weights, drafted by {_DRAFTERS[made['drafted_by']]}; "
            f"mean accepted length {made['mean_accepted']:.1f} of {drafted:.1f} drafted tokens a pass"
        )
    return lines


_DRAFTERS = {
    "quantized": "the quantized model",
    "baseline": "the baseline",
    "server": "the quantized model's server",
    "look-up": "looking up in the text",
}


def contamination_lines(contamination: Mapping[str, Any] | None) -> list[str]:
    """What the contamination check found, as warnings, or why it was not made; nothing without a quantized model."""
    if contamination is None:
        return []
    if contamination["checked_against"] is None:
        return [f"contamination: not checked ({contamination['not_checked']})"]
    what = f"{contamination['ngram']} words in a row with {contamination['checked_against']}"
    found = {task: count for task, count in contamination["items"].items() if count}
    if not found:
        return [f"contamination: no item shares {what}"]
    counts = ", ".join(f"{task} {count}" for task, count in found.items())
    return [f"WARNING: {sum(found.values())} items share {what}, the calibration text: {counts}"]
