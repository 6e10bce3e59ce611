"""What `fourge evaluate` says to people: tables of scores, or what data the tasks need."""

from typing import TYPE_CHECKING

from fourge.report.evaluation_text import evaluation_summary

if TYPE_CHECKING:
    from fourge.evaluate import EvaluateResult
    from fourge.evaluation.data_list import ListedTask


def evaluate_summary(result: "EvaluateResult") -> str:
    """Every evaluation's table and where it lies; or the list of data; or what was fetched."""
    parts = [
        f"{evaluation_summary(content)}\nwritten to {folder}"
        for content, folder in zip(result.evaluations, result.folders, strict=True)
    ]
    parts += [_listed_text(task) for task in result.listed]
    if result.listed:
        parts.append(_closing_text(result.listed))
    if result.fetched_to is not None:
        rows = sum(sum(entry.rows.values()) for entry in result.fetched)
        parts.append(
            f"{len(result.fetched)} datasets, {rows:,} rows in {result.fetched_to}; carry it over, and name it with "
            f"--task-data"
        )
    return ("\n\n" if result.evaluations else "\n").join(parts)


def _listed_text(task: "ListedTask") -> str:
    configs = f" ({task.configs} configs)" if task.configs > len(task.datasets) else ""
    questions = f"{task.items:,} questions" if task.items is not None else "questions"
    shots = f", {task.num_fewshot} shots from {task.shots_split}" if task.shots_split is not None else ""
    lines = [f"{task.task}: {', '.join(task.datasets)}{configs}, {questions} from {task.items_split}{shots}"]
    lines += [f"  {folder}" for folder in task.folders[:1]]
    if len(task.folders) > 1:
        lines.append(f"  and {len(task.folders) - 1} folders more")
    if task.missing:
        more = f" and {len(task.missing) - 1} more" if len(task.missing) > 1 else ""
        lines.append(f"  MISSING {task.missing[0]}{more}")
    return "\n".join(lines)


def _closing_text(listed: "list[ListedTask]") -> str:
    if not listed[0].looked:
        return "From the hub, or from local copies with --task-data; --fetch-data DIR makes such a folder."
    lacking = [task.task for task in listed if task.missing]
    return f"Data is missing for {', '.join(lacking)}." if lacking else "All data is there."
