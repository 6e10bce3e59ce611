"""Two runs, task by task and overall: what the quantized model kept, with the errors that pairing gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from fourge.errors import InputError
from fourge.evaluation.pairing import Pair, pair_items
from fourge.evaluation.rows import expand_rows
from fourge.evaluation.runs import ROLES, Run
from fourge.evaluation.samples import Item, read_items
from fourge.evaluation.scores import ScoreKey, choose_score
from fourge.evaluation.statistics import (
    Aggregate,
    Effect,
    PairedScores,
    Score,
    binomial_upper_tail,
    flips,
    holm,
    item_weighted_mean,
    macro_mean,
    mcnemar,
    mean_score,
    paired_delta,
    recovery,
)

CHANCE_LEVEL = 0.05
"""A baseline not above chance at this one-sided level (exact binomial test) is said to be at chance."""
_CHOSEN_BY_LIKELIHOOD = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
_TRUNCATION_SLACK = 2
"""Tokens below the limit that still count as cut off: a text does not always give back the tokens that it came from."""
_ROUNDING = 1e-9

CountTokens = Callable[[str], int]
Answers = Sequence[Mapping[int, Item]]
"""One model's answers to a task or group: for each task in it, items by `doc_id`."""


@dataclass(frozen=True)
class Lengths:
    """Generated answers of one model: their mean length, and the share that the token limit cut off."""

    mean_length: float
    truncated: float | None


@dataclass(frozen=True)
class Generation:
    """Lengths of both models' answers in `unit`: tokens, or characters where there is no tokenizer to count with."""

    unit: str
    baseline: Lengths
    quantized: Lengths


@dataclass(frozen=True)
class TaskComparison:
    """A task or group of both runs. What was not measured is None, and `note` says why.

    Scores are shares of 1. `items` counts pairs. `chance` is the score of guessing, for multiple choice;
    `only_baseline` and `only_quantized` count flips, None where items are not right or wrong.
    """

    task: str
    metric: str
    filter: str
    num_fewshot: int | None
    version: Any
    items: int
    chance: float | None = None
    at_chance: bool = False
    baseline: Score | None = None
    quantized: Score | None = None
    delta: Effect | None = None
    recovery: Effect | None = None
    only_baseline: int | None = None
    only_quantized: int | None = None
    mcnemar_p: float | None = None
    holm_p: float | None = None
    generation: Generation | None = None
    note: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All tasks, and two means over those that both runs have: `macro` by task, `item_weighted` by item.

    The means are None below two such tasks, and where a score is not a share of 1.
    """

    tasks: list[TaskComparison]
    macro: Aggregate | None
    item_weighted: Aggregate | None


Export = Callable[[str, ScoreKey, Sequence[Pair]], None]
"""Is given every compared task or group with its score and its pairs."""


def compare_runs(
    baseline: Run,
    quantized: Run,
    *,
    tasks: Sequence[str] | None = None,
    metrics: Mapping[str, str] | None = None,
    count_tokens: CountTokens | None = None,
    export: Export | None = None,
) -> Comparison:
    """Compares two runs item by item; holds the samples of one row in memory at a time.

    `tasks` names tasks and groups of either run [default: all; groups whose score is the mean over their items as
    one row each]. `metrics` is as for `choose_score`; `count_tokens` counts the tokens of a generated answer. A
    model that was not run is a `Run` without samples. Raises InputError for runs that were not asked the same, and
    for names that are not there.
    """
    rows, paired = [], []
    for task in expand_rows(baseline, quantized, tasks, metrics or {}):
        row = _Row(task, (baseline, quantized), metrics or {}, count_tokens, export)
        compared, scores = row.compare()
        rows.append(compared)
        if scores is not None:
            paired.append(scores)
    bounded = all((s.baseline <= 1).all() and (s.quantized <= 1).all() for s in paired)
    means = len(paired) > 1 and bounded
    return Comparison(
        _with_holm(rows), macro_mean(paired) if means else None, item_weighted_mean(paired) if means else None
    )


def _with_holm(rows: list[TaskComparison]) -> list[TaskComparison]:
    adjusted = iter(holm([row.mcnemar_p for row in rows if row.mcnemar_p is not None]))
    return [row if row.mcnemar_p is None else replace(row, holm_p=next(adjusted)) for row in rows]


class _NotMeasuredError(Exception):
    """Why a run has no usable score of a task."""


@dataclass(frozen=True)
class _Row:
    """One row of the comparison in the making."""

    task: str
    runs: tuple[Run, Run]
    metrics: Mapping[str, str]
    count_tokens: CountTokens | None
    export: Export | None

    def compare(self) -> tuple[TaskComparison, PairedScores | None]:
        """The row, and the scores where both runs have them."""
        holder = next(run for run in self.runs if run.recorded(self.task) or self._has(run))
        leaves = holder.leaves(self.task)
        key: ScoreKey | None = None
        answers: list[Answers | None] = []
        reasons: dict[str, str] = {}
        for role, run in zip(ROLES, self.runs, strict=True):
            try:
                of_run, key = self._read(run, leaves, key)
                answers.append(of_run)
            except _NotMeasuredError as reason:
                answers.append(None)
                reasons[role] = str(reason)
        metric, filter_name = key or choose_score(self.task, list(holder.recorded(self.task)), self.metrics)
        shots, version = (holder.task_fact(self.task, fact) for fact in ("n-shot", "versions"))
        note = _joined(reasons)
        blank = TaskComparison(self.task, metric, filter_name, shots, version, items=0, note=note)
        baseline, quantized = answers
        if baseline is None or quantized is None:
            return replace(blank, baseline=_score(baseline, metric), quantized=_score(quantized, metric)), None
        pairs = [
            pair
            for leaf, *both in zip(leaves, baseline, quantized, strict=True)
            for pair in pair_items(leaf, self.runs, both)
        ]
        if self.export is not None:
            self.export(self.task, (metric, filter_name), pairs)
        scores = _paired_scores(pairs, metric, by_subject=len(leaves) > 1)
        return _compare_pairs(blank, pairs, scores, self.count_tokens), scores

    def _has(self, run: Run) -> bool:
        return all(leaf in run.samples for leaf in run.leaves(self.task))

    def _read(self, run: Run, leaves: Sequence[str], key: ScoreKey | None) -> tuple[Answers, ScoreKey]:
        """A run's answers, and the score, which the first run that has the task chooses."""
        missing = [leaf for leaf in leaves if leaf not in run.samples]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise _NotMeasuredError(
                "not measured" if len(missing) == len(leaves) else f"no samples of {missing[0]}{more}"
            )
        answers: list[Mapping[int, Item]] = []
        for leaf in leaves:
            by_filter = read_items(leaf, run.samples[leaf])
            if key is None:
                firsts = {name: next(iter(items.values())) for name, items in by_filter.items()}
                logged = [(metric, name) for name, first in firsts.items() for metric in first.values]
                key = choose_score(self.task, list(run.recorded(self.task)) or logged, self.metrics)
            if key[1] not in by_filter:
                raise _NotMeasuredError(f"{leaf} has no filter {key[1]}")
            _check_complete(run, leaf, key, by_filter[key[1]])
            answers.append(by_filter[key[1]])
        assert key is not None
        return answers, key


def _joined(reasons: Mapping[str, str]) -> str | None:
    """Why models lack a score, said once where it is the same for both."""
    if len(reasons) == 2 and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{role}: {reason}" for role, reason in reasons.items()) or None


def _score(answers: Answers | None, metric: str) -> Score | None:
    if answers is None:
        return None
    values = [float(item.values[metric]) for items in answers for item in items.values()]
    return mean_score(np.array(values), np.repeat(np.arange(len(answers)), [len(items) for items in answers]))


def _check_complete(run: Run, task: str, key: ScoreKey, items: Mapping[int, Item]) -> None:
    """Holds the samples against what lm-eval recorded of them."""
    counted = run.task_fact(task, "n-samples")
    if counted is not None and counted["effective"] != len(items):
        raise InputError(
            f"{run.name}: {len(items)} samples of {task}, but its results count {counted['effective']}; evaluate again"
        )
    values = [item.values.get(key[0]) for item in items.values()]
    name = ",".join(key)
    if not all(isinstance(value, Real | np.bool_) for value in values):
        raise _NotMeasuredError(f"{name} of {task} is not a number an item; choose another with --metric")
    if (run.task_fact(task, "higher_is_better") or {}).get(key[0]) is False:
        raise _NotMeasuredError(f"{name} of {task} is better when lower; choose another with --metric")
    recorded = run.recorded(task).get(key)
    if recorded is not None and not abs(np.array(values, np.float64).mean() - recorded) < _ROUNDING:
        raise _NotMeasuredError(f"{name} of {task} is not the mean over its items; choose another with --metric")


def _paired_scores(pairs: Sequence[Pair], metric: str, by_subject: bool) -> PairedScores:
    numbers: dict[str, int] = {}
    subjects = [numbers.setdefault(pair.task, len(numbers)) for pair in pairs]
    return PairedScores(
        np.array([float(pair.baseline.values[metric]) for pair in pairs]),
        np.array([float(pair.quantized.values[metric]) for pair in pairs]),
        np.array(subjects, np.int64) if by_subject else None,
    )


def _compare_pairs(
    blank: TaskComparison, pairs: Sequence[Pair], scores: PairedScores, count_tokens: CountTokens | None
) -> TaskComparison:
    flipped = flips(scores)
    chance = _chance(pairs, blank.metric) if flipped is not None else None
    ratio = recovery(scores)
    notes = [blank.note] if blank.note else []
    at_chance = chance is not None and (
        binomial_upper_tail(int(scores.baseline.sum()), len(pairs), chance) >= CHANCE_LEVEL
    )
    if ratio is None:
        notes.append("the baseline scores nothing: no recovery, and this task cannot show damage")
    elif at_chance:
        notes.append(
            f"the baseline is not above chance ({chance:.1%}; exact binomial, one-sided, {CHANCE_LEVEL:.0%}): "
            "this task cannot show damage"
        )
    return replace(
        blank,
        items=len(pairs),
        chance=chance,
        at_chance=at_chance,
        baseline=mean_score(scores.baseline, scores.subjects),
        quantized=mean_score(scores.quantized, scores.subjects),
        delta=paired_delta(scores),
        recovery=ratio,
        only_baseline=None if flipped is None else flipped[0],
        only_quantized=None if flipped is None else flipped[1],
        mcnemar_p=None if flipped is None else mcnemar(*flipped),
        generation=_generation(pairs, count_tokens),
        note="; ".join(notes) or None,
    )


def _chance(pairs: Sequence[Pair], metric: str) -> float | None:
    """The mean of 1 / number of choices, for scores of the likeliest choice.

    Items with unlike numbers of choices are tested as if all had that mean: an upper tail too heavy, never too light.
    """
    counts = [len(pair.baseline.choices) for pair in pairs]
    if metric not in _CHOSEN_BY_LIKELIHOOD or min(counts) < 2:
        return None
    # For mutual information every choice is asked twice, with the question and without.
    twice = 2 if "acc_mutual_info" in pairs[0].baseline.values else 1
    return float(np.mean([twice / count for count in counts]))


def _generation(pairs: Sequence[Pair], count_tokens: CountTokens | None) -> Generation | None:
    if not pairs[0].baseline.responses:
        return None
    lengths = [_lengths(items, count_tokens) for items in zip(*((p.baseline, p.quantized) for p in pairs), strict=True)]
    return Generation("characters" if count_tokens is None else "tokens", *lengths)


def _lengths(items: Sequence[Item], count_tokens: CountTokens | None) -> Lengths:
    counted = [(item, (count_tokens or len)(response)) for item in items for response in item.responses]
    mean = float(np.mean([length for _, length in counted]))
    if count_tokens is None:
        return Lengths(mean, None)
    cut_off = [
        length >= item.max_gen_toks - _TRUNCATION_SLACK if item.truncated is None else item.truncated
        for item, length in counted
    ]
    return Lengths(mean, float(np.mean(cut_off)))
