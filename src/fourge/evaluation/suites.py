"""Suites as data: which of lm-eval's tasks, with how many shots, which score, under which settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fourge.errors import InputError

Thinking = Literal["on", "off"]


@dataclass(frozen=True)
class SuiteTask:
    """One row of a suite.

    `task` is lm-eval's name of a task or group, `folder` where in lm-eval's `tasks/` it lies. `metric` and `filter`
    name the score, as in lm-eval's `metric,filter`. `items` counts what the hub's data holds, all subjects together;
    `limit` takes only the first of each subject. `overrides` replace keys of lm-eval's own task file. An `optional`
    task is left out where local data lacks it. `thinking` lists the modes in which the task measures something.
    """

    task: str
    folder: str
    metric: str
    items: int
    num_fewshot: int = 0
    filter: str = "none"
    limit: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    thinking: tuple[Thinking, ...] = ("on", "off")

    @property
    def generates(self) -> bool:
        """Whether the model writes an answer; else the log-likelihoods of given answers are compared."""
        return self.metric not in ("acc", "acc_norm")


@dataclass(frozen=True)
class Suite:
    """A list of tasks and the settings that lm-eval has for a whole run.

    `generation` replaces the `generation_kwargs` of every task that generates, by thinking mode; where it is empty
    lm-eval's own stand.
    """

    name: str
    about: str
    tasks: tuple[SuiteTask, ...]
    apply_chat_template: bool
    fewshot_as_multiturn: bool
    generation: Mapping[Thinking, Mapping[str, Any]] = field(default_factory=dict)


# The published card of Hermes-4-405B-NVFP4 reports these six, with these shots and scores.
OPENLLM_V1 = Suite(
    name="openllm-v1",
    about="The Open LLM Leaderboard's first six tasks, as model cards report them.",
    tasks=(
        SuiteTask("arc_challenge", "arc", "acc_norm", 1172, num_fewshot=25),
        SuiteTask("gsm8k", "gsm8k", "exact_match", 1319, num_fewshot=5, filter="strict-match"),
        SuiteTask("hellaswag", "hellaswag", "acc_norm", 10042, num_fewshot=10),
        SuiteTask("mmlu", "mmlu", "acc", 14042, num_fewshot=5),
        SuiteTask("truthfulqa_mc2", "truthfulqa", "acc", 817),
        SuiteTask("winogrande", "winogrande", "acc", 1267, num_fewshot=5),
    ),
    apply_chat_template=True,
    fewshot_as_multiturn=True,
)

# Chat models end their turn themselves, and a train of thought runs over any stop string: stop at EOS alone. Greedy,
# so that both models can be compared item by item; the published report samples.
_UNTIL_END_OF_TURN: Mapping[str, Any] = {"until": [], "do_sample": False, "temperature": 0.0}

HERMES4 = Suite(
    name="hermes4",
    about="The tasks of Hermes 4's own report that lm-eval has, in reasoning and non-reasoning mode.",
    tasks=(
        # Answered with a letter, which the shots show; lm-eval's forms with a train of thought ask other questions.
        SuiteTask("mmlu_generative", "mmlu", "exact_match", 14042, num_fewshot=5, filter="get_response"),
        SuiteTask("mmlu_pro", "mmlu_pro", "exact_match", 12032, num_fewshot=5, filter="custom-extract"),
        SuiteTask("gpqa_diamond_cot_zeroshot", "gpqa", "exact_match", 198, filter="flexible-extract"),
        SuiteTask("bbh_cot_zeroshot", "bbh", "exact_match", 6511, filter="flexible-extract"),
        SuiteTask("ifeval", "ifeval", "prompt_level_strict_acc", 541),
        # Scored by F1 of the whole answer: the shots show that it is to be short.
        SuiteTask("drop", "drop", "f1", 9536, num_fewshot=3),
        # Log-likelihoods of the choices: there is nothing that thinking could change but the prompt.
        SuiteTask("openbookqa", "openbookqa", "acc_norm", 500, thinking=("off",)),
    ),
    apply_chat_template=True,
    fewshot_as_multiturn=True,
    generation={
        "off": {**_UNTIL_END_OF_TURN, "max_gen_toks": 4096},
        "on": {**_UNTIL_END_OF_TURN, "max_gen_toks": 16384},
    },
)

# Where the test questions are not to be had without a hub, the validation questions are asked; no shots, so that
# training data is not needed either.
_VALIDATION: Mapping[str, Any] = {"training_split": None, "test_split": None}

SMOKE = Suite(
    name="smoke",
    about="Minutes on a CPU: few items, no shots; five tasks on which a 135M model is above chance, three on which "
    "larger ones are.",
    tasks=(
        SuiteTask("hellaswag", "hellaswag", "acc_norm", 10042, limit=200, overrides=_VALIDATION),
        SuiteTask("arc_easy", "arc", "acc_norm", 570, limit=200, overrides=_VALIDATION),
        SuiteTask("piqa", "piqa", "acc_norm", 1838, limit=200, overrides=_VALIDATION),
        SuiteTask("sciq", "sciq", "acc_norm", 1000, limit=200, overrides=_VALIDATION),
        SuiteTask("lambada_openai", "lambada", "acc", 5153, limit=200, optional=True),
        SuiteTask("arc_challenge", "arc", "acc_norm", 299, limit=100, overrides=_VALIDATION),
        SuiteTask("winogrande", "winogrande", "acc", 1267, limit=100, overrides=_VALIDATION),
        SuiteTask("mmlu", "mmlu", "acc", 14042, limit=2),
    ),
    apply_chat_template=False,
    fewshot_as_multiturn=False,
)

SUITES: Mapping[str, Suite] = {suite.name: suite for suite in (OPENLLM_V1, HERMES4, SMOKE)}


def find_suite(name: str) -> Suite:
    """The suite of that name; InputError for one that is not known."""
    if name not in SUITES:
        raise InputError(f"--suite {name}: not known; there are {', '.join(SUITES)}, or name lm-eval's with --tasks")
    return SUITES[name]


def part_of_suite(name: str, tasks: Sequence[str]) -> Suite:
    """A suite with some of its tasks alone, in its own order; InputError for names that it does not have."""
    suite = find_suite(name)
    known = [task.task for task in suite.tasks]
    for task in tasks:
        if task not in known:
            raise InputError(f"--tasks {task}: suite {name} has no such task; it has {', '.join(known)}")
    return replace(suite, tasks=tuple(task for task in suite.tasks if task.task in tasks))


def known_folders() -> dict[str, str]:
    """Task names of all suites, with the folder of lm-eval's `tasks/` that each lies in."""
    return {task.task: task.folder for suite in SUITES.values() for task in suite.tasks}
