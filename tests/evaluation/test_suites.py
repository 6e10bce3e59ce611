"""Suites: lm-eval has every task, score and filter that they name; the leaderboard's shots are the published ones."""

from dataclasses import replace
from typing import Any

import pytest

from fourge.errors import InputError
from fourge.evaluation.suites import HERMES4, OPENLLM_V1, SMOKE, SUITES, Suite, SuiteTask, find_suite, part_of_suite
from fourge.evaluation.tasks import TaskChoice, TaskIndex, suite_choices

CARD = {
    "arc_challenge": (25, "acc_norm,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "mmlu": (5, "acc,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "winogrande": (5, "acc,none"),
}
"""Shots and scores of the published card of Hermes-4-405B-NVFP4."""


@pytest.fixture(scope="module")
def indices() -> dict[str, TaskIndex]:
    return {name: TaskIndex([task.task for task in suite.tasks]) for name, suite in SUITES.items()}


EVERY_TASK = [
    pytest.param(suite, task, id=f"{suite.name}-{task.task}") for suite in SUITES.values() for task in suite.tasks
]


def leaf_configs(index: TaskIndex, task: str) -> list[dict[str, Any]]:
    """lm-eval's own task files at and below a name."""
    return [index.manager.task_index[need.task].cfg for need in index.needs(TaskChoice(task))]


def test_openllm_v1_is_the_card() -> None:
    suite = {task.task: (task.num_fewshot, f"{task.metric},{task.filter}") for task in OPENLLM_V1.tasks}
    assert suite == CARD
    assert OPENLLM_V1.apply_chat_template and OPENLLM_V1.fewshot_as_multiturn


@pytest.mark.parametrize(("suite", "task"), EVERY_TASK)
def test_lm_eval_has_the_score(suite: Suite, task: SuiteTask, indices: dict[str, TaskIndex]) -> None:
    for config in leaf_configs(indices[suite.name], task.task):
        assert task.metric in [entry["metric"] for entry in config["metric_list"]], config["task"]
        filters = [entry["name"] for entry in config.get("filter_list", [{"name": "none"}])]
        assert task.filter in filters, config["task"]
        assert task.generates == (config["output_type"] == "generate_until")


@pytest.mark.parametrize(("suite", "task"), EVERY_TASK)
def test_shots_are_lm_evals_where_it_has_them(suite: Suite, task: SuiteTask, indices: dict[str, TaskIndex]) -> None:
    for config in leaf_configs(indices[suite.name], task.task):
        assert config.get("num_fewshot") in (None, task.num_fewshot), config["task"]


@pytest.mark.parametrize(("suite", "task"), EVERY_TASK)
def test_groups_have_a_score_of_their_own(suite: Suite, task: SuiteTask, indices: dict[str, TaskIndex]) -> None:
    entry = indices[suite.name].manager.task_index[task.task]
    if entry.kind.name != "GROUP":
        return
    [score] = [s for s in entry.cfg["aggregate_metric_list"] if s["metric"] == task.metric]
    assert score["weight_by_size"]
    assert task.filter in score.get("filter_list", "none")


def test_overrides_replace_what_lm_eval_would_read(indices: dict[str, TaskIndex]) -> None:
    [own] = indices["smoke"].needs(TaskChoice("arc_easy"))
    assert own.splits == ("test", "train")
    for choice in suite_choices(SMOKE, None):
        needs = indices["smoke"].needs(choice)
        assert all(need.num_fewshot == 0 for need in needs)
        assert all("train" not in need.splits for need in needs)


def test_thinking_leaves_out_what_it_cannot_change() -> None:
    assert {c.task for c in suite_choices(HERMES4, "off")} - {c.task for c in suite_choices(HERMES4, "on")} == {
        "openbookqa"
    }


def test_a_train_of_thought_has_room_and_no_stop_string() -> None:
    for mode, room in (("off", 4096), ("on", 16384)):
        generating = [c for c in suite_choices(HERMES4, mode) if "generation_kwargs" in c.overrides]
        assert len(generating) == 6
        for choice in generating:
            assert choice.overrides["generation_kwargs"] == {
                "until": [],
                "do_sample": False,
                "temperature": 0.0,
                "max_gen_toks": room,
            }


def test_a_part_of_a_suite_keeps_its_settings() -> None:
    part = part_of_suite("smoke", ["sciq", "hellaswag"])
    assert [task.task for task in part.tasks] == ["hellaswag", "sciq"]
    assert replace(part, tasks=SMOKE.tasks) == SMOKE and all(task in SMOKE.tasks for task in part.tasks)


def test_an_unknown_suite_is_told_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"--suite openllm: not known; there are openllm-v1, hermes4, smoke"):
        find_suite("openllm")


@pytest.mark.slow
def test_folders_alone_hold_what_all_of_lm_eval_holds(indices: dict[str, TaskIndex]) -> None:
    everything = TaskIndex(["arc_challenge", "xnli"])
    for name, suite in SUITES.items():
        for task in suite.tasks:
            choice = TaskChoice(task.task)
            assert indices[name].needs(choice) == everything.needs(choice), task.task
