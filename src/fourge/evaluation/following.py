"""An evaluation by several ranks: rank 0 runs it all, and calls the others in for every walk over the weights.

What they need to know of a walk they are told: which models, which rows. Between walks they wait.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.errors import InputError, RankLostError, TogetherError
from fourge.evaluation.lanes import open_lanes
from fourge.evaluation.scoring import ScoringPlan
from fourge.evaluation.scoring_job import ScoringJob
from fourge.evaluation.scoring_walk import ScoringWalk
from fourge.walk.held_folder import WalkPaths
from fourge.walk.ranks import Ranks
from fourge.walk.streams import Lane


@dataclass(frozen=True)
class _Call:
    """A walk from step `first` on; the models by lane, in the lanes' order."""

    models: Mapping[Lane, Path]
    dtype: torch.dtype
    plan: ScoringPlan
    keep_top: bool
    folder: Path
    first: int


@dataclass(frozen=True)
class _End:
    """Nothing more to walk; `error` is why, where rank 0 could not go on."""

    error: str | None = None


def walk_together(walk: ScoringWalk, job: ScoringJob) -> None:
    """Runs what is left of `walk` on all ranks, the others in `follow`; alone where there are none."""
    models = {lane.name: lane.checkpoint.directory for lane in walk.lanes}
    call = _Call(models, walk.lanes[0].walk.dtype, walk.plan, walk.keep_top, job.folder, job.next_step)
    walk.ranks.from_first(call)
    with walk.ranks.as_one():
        pass  # while the others open the models
    walk.run(job, job.next_step)


@contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """On rank 0: lets the others go at the end, or says to them why there will be none. They print nothing."""
    try:
        yield
    except (RankLostError, TogetherError):
        raise  # they know
    except InputError as error:
        ranks.from_first(_End(str(error)))
        raise
    ranks.from_first(_End())


def follow(ranks: Ranks) -> None:
    """On the other ranks: takes part in one walk after the other until rank 0 has no more."""
    while True:
        call: _Call | _End = ranks.from_first(None)
        if isinstance(call, _End):
            if call.error is not None:
                raise TogetherError(call.error)
            return
        with ranks.as_one():
            lanes = open_lanes(call.models.get("bf16"), call.models.get("nvfp4"), call.dtype, ranks)
        ScoringWalk(lanes, call.plan, keep_top=call.keep_top).run(WalkPaths(call.folder), call.first)
