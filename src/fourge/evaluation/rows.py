"""Which rows a comparison has: a group as one where its score is the mean over its items, else what is below it."""

from collections.abc import Iterator, Mapping, Sequence

from fourge.errors import InputError
from fourge.evaluation.runs import Run
from fourge.evaluation.scores import choose_score

_ROUNDING = 1e-9


def expand_rows(
    baseline: Run, quantized: Run, tasks: Sequence[str] | None, metrics: Mapping[str, str]
) -> Iterator[str]:
    """Names of tasks and groups: those asked for, in that order, or all by name.

    Raises InputError for one that neither run has.
    """
    runs = (quantized, baseline)
    groups = {name: members for run in runs for name, members in run.groups.items()}
    measured = dict.fromkeys([*baseline.samples, *quantized.samples])
    if tasks is None:
        below = {member for members in groups.values() for member in members}
        tasks = sorted(name for name in {*groups, *measured} if name not in below)
    for name in tasks:
        if name not in groups and name not in measured:
            raise InputError(f"{name}: neither run has samples of it; there are {', '.join([*groups, *measured])}")
        holder = next((run for run in (baseline, quantized) if name in run.groups), None)
        if holder is None or _is_mean_over_items(holder, name, metrics):
            yield name
        else:
            yield from expand_rows(baseline, quantized, groups[name], metrics)


def _is_mean_over_items(run: Run, group: str, metrics: Mapping[str, str]) -> bool:
    """Whether lm-eval recorded the group's score as the mean over its items; it may be the mean over its tasks."""
    recorded = run.recorded(group)
    if not recorded:
        return False
    key = choose_score(group, list(recorded), metrics)
    leaves = run.leaves(group)
    sizes = [(run.task_fact(leaf, "n-samples") or {}).get("effective", 0) for leaf in leaves]
    scores = [run.recorded(leaf).get(key) for leaf in leaves]
    if None in scores or not sum(sizes):
        return False
    mean = sum(size * score for size, score in zip(sizes, scores, strict=True) if score is not None) / sum(sizes)
    return bool(abs(mean - recorded[key]) < _ROUNDING)
