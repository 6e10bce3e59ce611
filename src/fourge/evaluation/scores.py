"""Which of a task's scores is reported: the suites' choice for their tasks, else the usual one."""

from collections.abc import Mapping, Sequence

from fourge.errors import InputError
from fourge.evaluation.suites import SUITES

ScoreKey = tuple[str, str]
"""lm-eval's name of a score: metric and filter, written `metric,filter`."""

_USUAL = ("acc_norm", "acc", "exact_match", "em", "prompt_level_strict_acc", "f1")
_OF_SUITES = {task.task: (task.metric, task.filter) for suite in SUITES.values() for task in suite.tasks}


def choose_score(task: str, recorded: Sequence[ScoreKey], asked: Mapping[str, str] | None = None) -> ScoreKey:
    """The score of `task` (or group) among those `recorded`, in the task's own order.

    `asked` maps tasks to `metric` or `metric,filter`, "" standing for every task. Without a filter the first
    recorded one is taken. Raises InputError where the asked one is not recorded.
    """
    wish = (asked or {}).get(task, (asked or {}).get("", ""))
    if wish:
        metric, _, filter_name = wish.partition(",")
        matching = [key for key in recorded if key[0] == metric and filter_name in ("", key[1])]
        if not matching:
            there = ", ".join(",".join(key) for key in recorded)
            raise InputError(f"--metric {wish}: {task} has no such score; it has {there} (--metric {task}=NAME)")
        return matching[0]
    if _OF_SUITES.get(task) in recorded:
        return _OF_SUITES[task]
    return min(recorded, key=lambda key: _USUAL.index(key[0]) if key[0] in _USUAL else len(_USUAL))


def parse_wishes(metrics: Sequence[str]) -> dict[str, str]:
    """`--metric` values, `METRIC` or `TASK=METRIC`, as `choose_score` takes them."""
    wishes = {}
    for text in metrics:
        task, separator, metric = text.rpartition("=")
        if not metric or (separator and not task):
            raise InputError(f"--metric {text}: write METRIC, or TASK=METRIC; METRIC as lm-eval names it: acc,none")
        wishes[task] = metric
    return wishes
