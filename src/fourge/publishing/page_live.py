"""The page of a job that is at work: written again after every step, until the job ends."""

import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fourge.errors import InputError
from fourge.publishing.evidence import JOB, METRICS, Evidence, read_metrics
from fourge.walk.job import read_manifest

REFRESH_SECONDS = 5
_LOOK_SECONDS = 0.5


def follow(output: Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[Evidence]:
    """What is known of the job in `output` now and after every step that it commits, while a process holds it.

    Ends when none does: the job is done, or was stopped. Raises InputError where no job was ever begun.
    """
    if not (output / JOB).is_file():
        raise InputError(f"{output}: no job is there to follow; start `fourge quantize … -o {output}` first")
    seen = None
    while is_held(output):
        now = (output / JOB).stat().st_mtime_ns, (output / METRICS).exists() and (output / METRICS).stat().st_size
        if now != seen:
            seen = now
            yield unfinished_evidence(output)
        sleep(_LOOK_SECONDS)


def is_held(output: Path) -> bool:
    """Whether a process works on the job in `output`: the job's lock ends with its process, however that ends."""
    with (output / JOB).with_name("lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def unfinished_evidence(output: Path) -> Evidence:
    """The evidence of a directory that is no checkpoint yet: what the job committed."""
    return Evidence(
        output=output,
        config={},
        index=None,
        job=read_manifest(output),
        metrics=read_metrics(output / METRICS),
        provenance=None,
        evaluations=(),
        plan=None,
        plan_failure="the checkpoint is not finished",
        weights=None,
    )
