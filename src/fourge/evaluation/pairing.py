"""Two runs' answers to the same questions, brought together; runs that were not asked the same are refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fourge.errors import InputError
from fourge.evaluation.runs import Run
from fourge.evaluation.samples import Item, agreement

_CAUSES = {
    "chat_template_sha": "the chat template",
    "system_instruction_sha": "the system instruction",
    "fewshot_as_multiturn": "fewshot_as_multiturn",
}
"""What lm-eval records of a run that changes its prompts."""
_EXCERPT = 40


@dataclass(frozen=True)
class Pair:
    """One question with both answers."""

    task: str
    baseline: Item
    quantized: Item


def pair_items(task: str, runs: tuple[Run, Run], items: Sequence[Mapping[int, Item]]) -> list[Pair]:
    """The items of both runs, by `doc_id`, in the first run's order.

    Raises InputError, naming the task and what differs, unless both runs were asked the same questions in the same
    words: task version, items, prompts, choices, targets, generation settings.
    """
    pairing = _Pairing(task, runs)
    pairing.check_version()
    first, second = items
    if first.keys() != second.keys():
        pairing.refuse_items(first, second)
    for doc_id, item in first.items():
        pairing.check_item(item, second[doc_id])
    return [Pair(task, item, second[doc_id]) for doc_id, item in first.items()]


@dataclass(frozen=True)
class _Pairing:
    task: str
    runs: tuple[Run, Run]

    def check_version(self) -> None:
        versions = self._facts_of_task("versions")
        if None not in versions and versions[0] != versions[1]:
            self._refuse(f"task version {versions[0]} and {versions[1]}")

    def refuse_items(self, first: Mapping[int, Item], second: Mapping[int, Item]) -> NoReturn:
        only = sorted(first.keys() ^ second.keys())
        self._refuse(f"{len(first)} and {len(second)} items, doc {only[0]} in one of them alone")

    def check_item(self, first: Item, second: Item) -> None:
        doc = f"doc {first.doc_id}"
        if first.prompt_hash != second.prompt_hash or first.prompt != second.prompt:
            self._refuse(self._cause() or f"the prompt of {doc}: {_difference(first.prompt, second.prompt)}")
        if first.choices != second.choices:
            texts = ("".join(first.choices), "".join(second.choices))
            self._refuse(f"the choices of {doc}: {_difference(*texts)}")
        if first.target_hash != second.target_hash:
            self._refuse(f"the target of {doc}: {_difference(first.target, second.target)}")
        if first.generation != second.generation:
            self._refuse(f"the generation settings of {doc}: {first.generation} and {second.generation}")

    def _cause(self) -> str | None:
        """Why prompts differ, from what both runs recorded of themselves."""
        shots = self._facts_of_task("n-shot")
        if None not in shots and shots[0] != shots[1]:
            return f"num_fewshot {shots[0]} and {shots[1]}"
        for key, name in _CAUSES.items():
            first, second = (run.fact(self.task, key) for run in self.runs)
            if first != second:
                return f"{name}: {_brief(first)} and {_brief(second)}"
        return None

    def _facts_of_task(self, key: str) -> tuple[object, object]:
        return self.runs[0].task_fact(self.task, key), self.runs[1].task_fact(self.task, key)

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"{self.task} was not the same in {self.runs[0].name} and {self.runs[1].name}: {what}; "
            "evaluate both models with the same tasks and options"
        )


def _difference(first: str, second: str) -> str:
    """Where two texts part, and how each goes on."""
    at = agreement(first, second)
    return f"from character {at} on {first[at : at + _EXCERPT]!r} and {second[at : at + _EXCERPT]!r}"


def _brief(fact: object) -> str:
    return fact[:12] if isinstance(fact, str) else "none" if fact is None else str(fact)
