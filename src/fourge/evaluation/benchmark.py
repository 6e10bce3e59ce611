"""What `fourge evaluate` measures: a suite or tasks by name, lm-eval's settings for them, and where the data lies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fourge.errors import InputError
from fourge.evaluation.suites import Suite, Thinking, find_suite, part_of_suite
from fourge.evaluation.task_data import Need, TaskData
from fourge.evaluation.tasks import TaskChoice, TaskIndex, suite_choices


@dataclass(frozen=True)
class Prompts:
    """lm-eval's settings of a whole run that change what models read; names are lm-eval's."""

    apply_chat_template: bool
    fewshot_as_multiturn: bool
    num_fewshot: int | None
    gen_kwargs: str | None
    limit: int | float | None
    system_instruction: str | None
    seed: int | None


@dataclass(frozen=True)
class Benchmark:
    """Which tasks are run and how: a suite, or tasks by name.

    `index` knows lm-eval's task files, `choices` are the tasks in one thinking mode, `data` the local folders (None:
    the hub, or the `datasets` library's cache).
    """

    name: str
    suite: Suite | None
    index: TaskIndex
    choices: tuple[TaskChoice, ...]
    prompts: Prompts
    data: TaskData | None

    def needs(self, choice: TaskChoice) -> list[Need]:
        """What one of the choices reads."""
        return self.index.needs(choice, self.prompts.num_fewshot)

    def in_mode(self, thinking: Thinking | None) -> "Benchmark":
        """The same tasks in a thinking mode; a suite has its own list for each."""
        if self.suite is None:
            return self
        choices = suite_choices(self.suite, thinking)
        if self.prompts.limit is not None:
            choices = [replace(choice, limit=None) for choice in choices]
        return replace(self, choices=tuple(choices))

    def with_data(self) -> "Benchmark":
        """The same, once all data is found: optional tasks without any are left out, shots that nobody asks for too.

        Raises InputError for data that is missing.
        """
        if self.data is None:
            return self
        kept = [self._with_data(choice, self.data) for choice in self.choices]
        found = replace(self, choices=tuple(choice for choice in kept if choice is not None))
        self.data.require(need for choice in found.choices for need in found.needs(choice))
        return found

    def _with_data(self, choice: TaskChoice, data: TaskData) -> TaskChoice | None:
        needs = self.needs(choice)
        copies = [data.find(need) for need in needs]
        if choice.optional and None in copies:
            return None
        unasked = all(need.num_fewshot == 0 for need in needs)
        lacking = any(c is not None and n.shots_split not in c.splits for n, c in zip(needs, copies, strict=True))
        return choice.without_shots() if unasked and lacking else choice

    @property
    def left_out(self) -> list[str]:
        """Tasks of the suite that are not among the choices: not measured in this mode, or without data."""
        if self.suite is None:
            return []
        chosen = {choice.task for choice in self.choices}
        return [task.task for task in self.suite.tasks if task.task not in chosen]


def choose_benchmark(
    suite: str | None,
    tasks: Sequence[str] | None,
    prompts: "PromptOptions",
    data: TaskData | None,
    include_path: Path | None = None,
) -> Benchmark:
    """The benchmark of `--suite`, of `--tasks`, or of both: those of the suite's tasks, under its settings.

    `include_path` is a folder with task files beside lm-eval's own, for `tasks` without a suite. Raises InputError for
    neither, and for names that nobody knows.
    """
    names = [name.strip() for text in tasks or () for name in text.split(",") if name.strip()]
    if suite is None and not names:
        raise InputError("name the tasks: --suite openllm-v1, hermes4 or smoke, or --tasks with lm-eval's names")
    if suite is not None:
        chosen = find_suite(suite) if not names else part_of_suite(suite, names)
        if include_path is not None:
            raise InputError(f"--include-path: suite {suite} is of lm-eval's own tasks; use --tasks for other ones")
        if prompts.num_fewshot is not None:
            raise InputError(f"--num-fewshot: suite {suite} has its own number of shots; use --tasks for other ones")
        index = TaskIndex([task.task for task in chosen.tasks])
        resolved = prompts.resolved(chosen.apply_chat_template, chosen.fewshot_as_multiturn)
        return Benchmark(suite, chosen, index, (), resolved, data).in_mode(None)
    index = TaskIndex(names, include_path)
    choices = tuple(TaskChoice(name) for name in index.expand(names))
    # lm-eval's own default: several turns wherever there is a template.
    resolved = prompts.resolved(False, prompts.apply_chat_template is True)
    return Benchmark("+".join(names), None, index, choices, resolved, data)


@dataclass(frozen=True)
class PromptOptions:
    """The options of `Prompts` as given; None leaves it to the suite."""

    apply_chat_template: bool | None
    fewshot_as_multiturn: bool | None
    num_fewshot: int | None
    gen_kwargs: str | None
    limit: int | float | None
    system_instruction: str | None = None
    seed: int | None = None

    def resolved(self, apply_chat_template: bool, fewshot_as_multiturn: bool) -> Prompts:
        """With defaults for what was not given; InputError for turns without a template."""
        chat = apply_chat_template if self.apply_chat_template is None else self.apply_chat_template
        turns = self.fewshot_as_multiturn
        if turns and not chat:
            raise InputError("--fewshot-as-multiturn: turns need a chat template; add --apply-chat-template")
        multiturn = (fewshot_as_multiturn and chat) if turns is None else turns
        return Prompts(
            chat, multiturn, self.num_fewshot, self.gen_kwargs, self.limit, self.system_instruction, self.seed
        )
