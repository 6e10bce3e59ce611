"""What a check says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_MOST_FAILURES = 20

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing looked at. `detail` says what, with counts, or why it was skipped; `failures` what is wrong.

    Each failure names its tensor, file or key. There are at most 20; a last line says how many more were found.
    """

    name: str
    status: Status
    detail: str
    failures: tuple[str, ...] = ()


def conclude(name: str, detail: str, failures: Iterable[str]) -> Check:
    """A check that was made: failed if anything was found."""
    found = list(failures)
    shown = found[:_MOST_FAILURES]
    if len(found) > len(shown):
        shown.append(f"and {len(found) - len(shown)} more")
    return Check(name, "failed" if found else "passed", detail, tuple(shown))


def skipped(name: str, why: str) -> Check:
    """A check that was not made."""
    return Check(name, "skipped", why)


def count(number: int, noun: str) -> str:
    """`1 shard`, `5 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
