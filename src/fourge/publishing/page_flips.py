"""Questions that one model answers right and the other wrong: prompt and both answers side by side, to be searched."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourge.errors import InputError
from fourge.evaluation.comparison import compare_runs
from fourge.evaluation.pair_files import pair_row
from fourge.evaluation.pairing import Pair
from fourge.evaluation.runs import open_run
from fourge.evaluation.scores import ScoreKey
from fourge.publishing.evidence import Evidence
from fourge.publishing.page_markup import Markup, Node, tag
from fourge.publishing.page_section import Section, missing, note

_LONGEST = 1600
"""Characters of a prompt or an answer; of a longer one the end of the prompt, the beginning of the answer."""
_ROLES = ("baseline", "quantized")
_BY_SUM, _BY_LENGTH = "acc", "acc_norm"


@dataclass
class Flips:
    """Flipped questions as `pair_row` gives them: all are counted, the first `most` of a task are kept."""

    most: int
    found: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self, row: str, key: ScoreKey, pairs: Sequence[Pair]) -> None:
        """Keeps the flips among a task's pairs."""
        kept = 0
        for pair in pairs:
            scores = [float(item.values[key[0]]) for item in (pair.baseline, pair.quantized)]
            if sorted(scores) != [0.0, 1.0]:
                continue
            self.found[row] = self.found.get(row, 0) + 1
            self.lost += scores[0] == 1.0
            if kept < self.most:
                kept += 1
                self.rows.append(pair_row(row, key, pair))


def collect_flips(evidence: Evidence, most: int) -> Flips:
    """The flips of every stored evaluation, a task's samples in memory at a time."""
    flips = Flips(most)
    for evaluation in evidence.evaluations:
        folders: list[Path] = [evaluation.folder / role for role in _ROLES]
        if not all(folder.is_dir() for folder in folders):
            flips.problems.append(f"{evaluation.name} has no samples of both models")
            continue
        try:
            compare_runs(*map(open_run, folders), export=flips.take)
        except InputError as error:
            flips.problems.append(f"{evaluation.name}: {error}")
    return flips


def flips_section(flips: Flips, evidence: Evidence) -> Section:
    """A field to search with, and one article a question."""
    topic = "Changed answers"
    if not evidence.evaluations:
        return missing("flips", topic, "No benchmark was run, so there are no answers to compare")
    total = sum(flips.found.values())
    if not total:
        return missing(
            "flips", topic, "; ".join(["No question has one model right and the other wrong", *flips.problems])
        )
    finding = f"{total:,} answers changed sides: {flips.lost:,} lost, {total - flips.lost:,} won"
    body: tuple[Node, ...] = (
        _search(flips),
        tag("div", [_flip(row) for row in flips.rows], id="flip-list"),
        note(
            _kept(flips, total),
            " Figures are log-likelihoods; bold is what the model picked, under acc_norm by log-likelihood a "
            "character; ✓ is right.",
        ),
        [note(problem) for problem in flips.problems],
    )
    return Section("flips", topic, finding, body, "the samples beside each evaluation.json")


def _kept(flips: Flips, total: int) -> str:
    tasks = ", ".join(f"{task} {count:,}" for task, count in flips.found.items())
    if len(flips.rows) == total:
        return f"All {total:,} are here ({tasks})."
    return f"{len(flips.rows):,} of {total:,} are here, the first {flips.most} of a task ({tasks})."


def _search(flips: Flips) -> Markup:
    """Hidden until the script runs: without it, the browser's own search finds in the open list."""
    tasks = [tag("option", task, value=task) for task in flips.found]
    field_ = tag("input", type="search", id="flip-search", placeholder="Search prompts and answers", autocomplete="off")
    return tag(
        "div",
        tag("label", "Search", field_),
        tag("label", "Task", tag("select", tag("option", "all", value=""), tasks, id="flip-task")),
        tag(
            "label",
            "Side",
            tag(
                "select",
                tag("option", "both", value=""),
                tag("option", "lost", value="lost"),
                tag("option", "won", value="won"),
                id="flip-side",
            ),
        ),
        tag("output", f"{len(flips.rows):,} shown", id="flip-count"),
        class_="controls",
        hidden=True,
    )


def _flip(row: dict[str, Any]) -> Markup:
    side = "lost" if row["baseline_right"] else "won"
    title = f"{row['task']}, item {row['doc_id']}"
    answers = [_answer(row, role) for role in _ROLES]
    target = None if row["choices"] else tag("p", tag("b", "Target "), _beginning(row["target"]), class_="target")
    return tag(
        "article",
        tag("h3", tag("span", side, class_=f"side {side}"), title),
        tag("pre", _end(row["prompt"]), class_="prompt"),
        target,
        tag("div", answers, class_="answers"),
        class_="flip",
        data_task=row["row"],
        data_side=side,
    )


def _answer(row: dict[str, Any], role: str) -> Markup:
    right = bool(row[f"{role}_right"])
    mark = tag("span", "right" if right else "wrong", class_="right" if right else "wrong")
    body = _generated(row, role) if row[f"{role}_answer"] is not None else _choices(row, role)
    return tag("div", tag("h4", role, " ", mark), body)


def _generated(row: dict[str, Any], role: str) -> list[Node]:
    extracted = row[f"{role}_extracted"]
    taken = None if extracted is None else tag("p", tag("b", "Taken as "), _beginning(extracted))
    return [tag("pre", _beginning(row[f"{role}_answer"])), taken]


def _choices(row: dict[str, Any], role: str) -> Markup:
    """Every choice with its log-likelihood; the model's own stands out, the right one has a tick."""
    likelihoods = row[f"{role}_loglikelihoods"]
    picked = _picked(row, role)
    lines = []
    for number, (choice, likelihood) in enumerate(zip(row["choices"], likelihoods, strict=True)):
        right = len(likelihoods) > 1 and row["target"] == str(number)
        lines.append(
            tag(
                "tr",
                tag("td", "✓" if right else None, class_="tick"),
                tag("td", _beginning(choice)),
                tag("td", f"{likelihood:.2f}".replace("-", "−"), class_="figure"),
                class_="picked" if number == picked else None,
            )
        )
    return tag("table", tag("tbody", lines), class_="choices")


def _picked(row: dict[str, Any], role: str) -> int | None:
    """Which choice the model took: by log-likelihood, or that by the choice's length, as the metric has it.

    None for other metrics, for a single choice, and where that pick does not explain the score.
    """
    likelihoods, choices = row[f"{role}_loglikelihoods"], row["choices"]
    if len(choices) < 2 or row["metric"] not in (_BY_SUM, _BY_LENGTH):
        return None
    lengths = [len(choice.removeprefix(" ")) if row["metric"] == _BY_LENGTH else 1 for choice in choices]
    per_character = [likelihood / max(length, 1) for likelihood, length in zip(likelihoods, lengths, strict=True)]
    best = per_character.index(max(per_character))
    return best if (str(best) == row["target"]) == row[f"{role}_right"] else None


def _end(prompt: str) -> str:
    if len(prompt) <= _LONGEST:
        return prompt
    return f"[{len(prompt) - _LONGEST:,} characters before]\n…{prompt[-_LONGEST:]}"


def _beginning(answer: str) -> str:
    if len(answer) <= _LONGEST:
        return answer
    return f"{answer[:_LONGEST]}…\n[{len(answer) - _LONGEST:,} characters after]"
