"""What listens at the inputs of a layer's groups while micro-batches run through it, on whichever rank they run.

A micro-batch leaves a summary for every listener, a tensor. The summaries of all micro-batches are added up on all
ranks in the order of the micro-batches.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from fourge.walk.linear import InputSite, Rounding


class SeenEnoughError(Exception):
    """Raised by an observer that needs nothing of what the layer would compute from here on."""


class Observer(Protocol):
    """Something that is summed over micro-batches."""

    def summarise(self, x: Tensor) -> Tensor:
        """What is to be known of the inputs `[..., K]` of one micro-batch."""
        ...

    def add(self, summary: Tensor, /) -> None:
        """Takes the next micro-batch's summary."""
        ...


class Observers:
    """An observer a group, by the group's name. With `then_stop` a layer runs no further than to the last of them."""

    def __init__(self, observers: Mapping[str, Observer] | None = None, *, then_stop: bool = False) -> None:
        self._observers = dict(observers or {})
        self._then_stop = then_stop
        self._seen: dict[str, Tensor] = {}

    def site(self, group: str, round_input: Rounding | None = None) -> InputSite:
        """The input site that lets `group`'s observer see; `round_input` as `InputSite` takes it."""
        return InputSite(round_input, partial(self._see, group))

    @property
    def sites(self) -> dict[str, InputSite]:
        """Sites of all groups that are observed, none of which quantizes."""
        return {group: self.site(group) for group in self._observers}

    def _see(self, group: str, x: Tensor) -> None:
        self._seen[group] = self._observers[group].summarise(x)
        if self._then_stop and len(self._seen) == len(self._observers):
            raise SeenEnoughError

    def collect(self) -> Sequence[Tensor]:
        """What the micro-batch that ran just now leaves, to be added on every rank."""
        seen, self._seen = self._seen, {}
        return [seen[group] for group in self._observers]

    def add(self, summaries: Sequence[Tensor]) -> None:
        """Takes what the next micro-batch left."""
        for observer, summary in zip(self._observers.values(), summaries, strict=True):
            observer.add(summary)
