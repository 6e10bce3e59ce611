"""The page's first figure: what the quantized model kept of every benchmark, with intervals."""

from collections.abc import Mapping
from typing import Any

from fourge.publishing.evidence import Evidence, StoredEvaluation
from fourge.publishing.markdown import NONE, shared_command
from fourge.publishing.page_axes import Scale, percent, svg, text, titled, x_axis
from fourge.publishing.page_markup import Markup, Node, table, tag
from fourge.publishing.page_section import Section, folded, missing, note
from fourge.report.evaluation_text import joined_notes, limit_text, shown_recovery

_Z95 = 1.959964
_LEVEL = 0.05
_TOP, _ROW, _LEFT, _RIGHT, _WIDTH = 14, 26, 250, 860, 1120


def recovery_section(evidence: Evidence) -> Section:
    """One forest of intervals for each stored evaluation."""
    compared = [evaluation for evaluation in evidence.evaluations if _is_compared(evaluation)]
    if not compared:
        name = evidence.output.name
        command = f"fourge evaluate {name} --baseline SOURCE --suite openllm-v1"
        return missing("recovery", "Recovery", "No benchmark was run on both models", command)
    body = [_evaluation(evaluation) for evaluation in compared]
    files = ", ".join(evaluation.file for evaluation in compared)
    return Section("recovery", "Recovery", _finding(compared), (body,), files)


def _is_compared(evaluation: StoredEvaluation) -> bool:
    return any(task["delta"] is not None for task in evaluation.content["tasks"])


def _rows(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Tasks with a recovery that says something, and below them the mean over tasks."""
    tasks = content["tasks"]
    rows = [task for task in tasks if shown_recovery(task, tasks) is not None]
    if content["macro"] is not None and shown_recovery(content["macro"], tasks) is not None:
        rows.append({**content["macro"], "task": "mean of tasks", "mean": True})
    return rows


def _finding(compared: list[StoredEvaluation]) -> str:
    tasks = [row for evaluation in compared for row in _rows(evaluation.content) if not row.get("mean")]
    if not tasks:
        return "No benchmark can show damage: the baseline is nowhere above chance"
    lost = [row for row in tasks if _is_lost(row)]
    worst = min(tasks, key=lambda row: float(row["recovery"]["value"]))
    if len(tasks) == 1:
        falls = "falls" if lost else "does not fall"
        return f"The one benchmark above chance {falls} significantly below the baseline: recovery {_worst(worst)}"
    which = f"{len(lost) or 'None'} of {len(tasks)} benchmarks above chance"
    falls = "fall" if len(lost) > 1 else "falls"
    return f"{which} {falls} significantly below the baseline; the lowest recovery is {_worst(worst)}"


def _is_lost(task: Mapping[str, Any]) -> bool:
    """By the exact test over flips, corrected for the number of tasks; by the interval where there are no flips."""
    if task["holm_p"] is None:
        return _interval(task["recovery"])[1] < 1
    return bool(task["delta"]["value"] < 0 and task["holm_p"] < _LEVEL)


def _worst(row: Mapping[str, Any]) -> str:
    return f"{percent(row['recovery']['value'])}, {row['task']}"


def _interval(effect: Mapping[str, Any]) -> tuple[float, float]:
    """95 %, from the paired standard error; without one the value alone."""
    reach = _Z95 * (effect["se"] or 0.0)
    return effect["value"] - reach, effect["value"] + reach


def _evaluation(evaluation: StoredEvaluation) -> list[Node]:
    content = evaluation.content
    engine, settings = content["engine"], content["settings"]
    facts = [
        evaluation.name,
        f"{engine['name']} engine",
        engine["numerics"],
        f"{engine['compute_dtype']} on {engine['device']}",
    ]
    if settings["limit"] is not None:
        facts.append(f"{limit_text(settings['limit'])} of each task")
    rows, notes = _rows(content), [f"{note}." for note in joined_notes(content["tasks"])]
    return [
        tag("h3", " · ".join(facts)),
        _forest(rows) if rows else None,
        _table(evaluation),
        note(
            "Bars are 95 % intervals of the paired ratio, each for itself. Significant is a Holm p below 5 %, from the "
            "exact test over lost and won items; where items are not right or wrong, an interval below 100 %. ",
            " ".join(notes),
        ),
        folded("The command", tag("pre", shared_command(content["command"]))),
    ]


def _forest(rows: list[Mapping[str, Any]]) -> Markup:
    ends = [end for row in rows for end in _interval(row["recovery"])]
    low, high = min([*ends, 0.98]), max([*ends, 1.02])
    margin = 0.05 * (high - low)
    scale = Scale(low - margin, high + margin, _LEFT, _RIGHT)
    bottom = _TOP + _ROW * len(rows)
    grid = [tag("line", x1=scale(x), x2=scale(x), y1=_TOP, y2=bottom, class_="grid") for x in scale.ticks(8)]
    whole = tag("line", x1=scale(1.0), x2=scale(1.0), y1=_TOP - 6, y2=bottom, class_="reference")
    marks = [_mark(row, scale, _TOP + _ROW * (number + 0.5)) for number, row in enumerate(rows)]
    axis = x_axis(scale, bottom + 16, lambda x: percent(x, 0), scale.ticks(8))
    label = "Recovery by task with 95 % intervals: " + "; ".join(_spoken(row) for row in rows)
    return svg(_WIDTH, bottom + 24, label, grid, whole, marks, axis)


def _spoken(row: Mapping[str, Any]) -> str:
    low, high = _interval(row["recovery"])
    return f"{row['task']} {percent(row['recovery']['value'])} ({percent(low)} to {percent(high)})"


def _mark(row: Mapping[str, Any], scale: Scale, y: float) -> Markup:
    low, high = _interval(row["recovery"])
    kind = "mean" if row.get("mean") else ""
    return tag(
        "g",
        text(_LEFT - 14, y + 4, row["task"], "end", "label"),
        tag("line", x1=scale(low), x2=scale(high), y1=y, y2=y, class_="interval"),
        titled("circle", _spoken(row), cx=scale(row["recovery"]["value"]), cy=y, r=5, class_="dot"),
        text(
            _RIGHT + 16,
            y + 4,
            f"{percent(row['recovery']['value'])}   {percent(low)} to {percent(high)}",
            class_="value",
        ),
        class_=kind,
    )


def _table(evaluation: StoredEvaluation) -> Markup:
    content = evaluation.content
    header = (
        "task",
        "score",
        "shots",
        "items",
        "baseline",
        "quantized",
        "difference",
        "recovery",
        "lost",
        "won",
        "Holm p",
    )
    rows: list[tuple[Node, ...]] = [
        (
            task["task"],
            task["metric"] if task["filter"] in ("none", "") else f"{task['metric']} ({task['filter']})",
            task["num_fewshot"],
            evaluation.items_text(task) or None,
            _plus_minus(task["baseline"], "score"),
            _plus_minus(task["quantized"], "score"),
            _plus_minus(task["delta"], "value", "+"),
            _plus_minus(shown_recovery(task, content["tasks"]), "value") or NONE,
            task["only_baseline"],
            task["only_quantized"],
            None if task["holm_p"] is None else f"{task['holm_p']:.3g}",
        )
        for task in content["tasks"]
    ]
    for key, name in (("macro", "mean of tasks"), ("item_weighted", "mean of items")):
        mean = content[key]
        if mean is not None:
            scores = [_plus_minus(mean[role], "score") for role in ("baseline", "quantized")]
            recovery = shown_recovery(mean, content["tasks"])
            effects = [_plus_minus(mean["delta"], "value", "+"), _plus_minus(recovery, "value") or NONE]
            rows.append((name, None, None, mean["items"], *scores, *effects, None, None, None))
    return table(header, rows, class_="numbers")


def _plus_minus(figure: Mapping[str, Any] | None, key: str, sign: str = "") -> str | None:
    if figure is None:
        return None
    value = f"{100 * figure[key]:{sign}.1f}".replace("-", "−")
    return value if figure["se"] is None else f"{value} ± {100 * figure['se']:.1f}"
