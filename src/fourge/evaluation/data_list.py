"""`--list-data`: what the tasks of an evaluation read, and whether it is there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fourge.evaluation.suites import Suite
from fourge.evaluation.task_data import Need, TaskData


@dataclass(frozen=True)
class ListedTask:
    """The data of one task or group.

    `datasets` are hub names, `configs` how many of them are read. `items` counts the questions where known.
    `folders` are the local copies found, `missing` what they lack: dataset and split, or a task that makes its own
    data. Both are empty where no folder was given to look in.
    """

    task: str
    datasets: tuple[str, ...]
    configs: int
    items_split: str
    shots_split: str | None
    num_fewshot: int
    items: int | None
    folders: tuple[str, ...]
    missing: tuple[str, ...]
    looked: bool


def list_task(task: str, needs: Sequence[Need], suite: Suite | None, data: TaskData | None) -> ListedTask:
    """What one task or group with these `needs` reads, looked for in `data`."""
    first = needs[0]
    known = {row.task: row.items for row in suite.tasks} if suite is not None else {}
    folders: list[str] = []
    missing: list[str] = []
    for need in needs:
        found = None if data is None else data.find(need)
        if found is not None:
            folders.append(str(found.folder))
        if data is not None:
            missing += _missing(need, () if found is None else found.splits)
    return ListedTask(
        task=task,
        datasets=tuple(dict.fromkeys(need.path or "made by the task's own code" for need in needs)),
        configs=len({(need.path, need.config) for need in needs}),
        items_split=first.items_split,
        shots_split=first.shots_split if first.num_fewshot else None,
        num_fewshot=first.num_fewshot,
        items=known.get(task),
        folders=tuple(dict.fromkeys(folders)),
        missing=tuple(missing),
        looked=data is not None,
    )


def _missing(need: Need, there: Iterable[str]) -> list[str]:
    if need.path is None:
        return [f"{need.task}: its own code makes the data"]
    return [f"{need.dataset}:{split}" for split in need.splits if split not in there]
