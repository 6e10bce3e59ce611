"""Several processes at one job, started by torchrun: what is done by one of them, and how all come to know it.

Everything that is shared goes one way: a list of pieces of work, dealt out one by one, and the results handed to every
rank in the order of the pieces. So whatever is summed over them is summed in one order, by
whichever number of ranks, and comes out the same to the bit. A process alone is rank 0 of 1 and communicates nothing.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fourge.errors import InputError, RankLostError, TogetherError
from fourge.launch import Launch, read_launch
from fourge.settings import first_difference

T = TypeVar("T")

TIMEOUT = timedelta(hours=6)
"""A process that ends is noticed at once, for its connections close; a machine that falls silent after this time. So
long, for rank 0 does some things alone that may take hours: rendering text, hashing a large source."""

_MOST_BYTES = 1 << 30  # sent at once


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. `device` is its own; tensors that are shared lie there or on the CPU."""

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, commits and speaks."""
        return self.rank == 0

    @property
    def turn(self) -> int:
        """Of `size` pieces in a row, the one that is this rank's. Rank 0 comes last: it has the writing to do beside,
        and where pieces are left over, it is spared."""
        return self.size - 1 - self.rank

    # Sharing work

    def own(self, pieces: Sequence[T]) -> Sequence[T]:
        """Those of `pieces` that `share` has this rank work on, in their order."""
        return pieces[self.turn :: self.size]

    def share(self, pieces: Sequence[T], work: Callable[[T], Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
        """What `work` makes of every piece, in the order of the pieces, on every rank; each does one in `size`.

        To be exhausted by all ranks alike. One piece's result of another rank is held at a time. An InputError in one
        rank's work is raised in all.
        """
        for start in range(0, len(pieces), self.size):
            mine = start + self.turn
            made: Sequence[Tensor] = ()
            error = None
            try:
                if mine < len(pieces):
                    made = work(pieces[mine])
            except InputError as raised:
                error = raised
            shapes = self._agree(error, [(tuple(tensor.shape), tensor.dtype, tensor.is_cuda) for tensor in made])
            yield from self._hand_out(made, shapes[::-1][: len(pieces) - start])

    def map(self, function: Callable[[T], float], values: Sequence[T]) -> list[float]:
        """`function` of every value, each computed by one rank."""
        made = self.share(values, lambda value: (torch.tensor(function(value), dtype=torch.float64),))
        return [number.item() for (number,) in made]

    def fill(self, blocks: Sequence[Tensor]) -> None:
        """Has every rank hold all `blocks`, of which this rank's are right: those at `turn`, `turn` + `size`, …"""
        for block, (right,) in zip(blocks, self.share(blocks, lambda block: (block,)), strict=True):
            if right is not block:
                block.copy_(right)

    def _hand_out(
        self, made: Sequence[Tensor], shapes: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype, bool]]]
    ) -> Iterator[Sequence[Tensor]]:
        """What every rank made, by turns: `made` itself, and the others' tensors, whose shapes are known."""
        for turn, described in enumerate(shapes):
            if self.size == 1:
                yield made
                continue
            tensors = made
            if turn != self.turn:
                tensors = [
                    torch.empty(shape, dtype=dtype, device=self.device if on_gpu else "cpu")
                    for shape, dtype, on_gpu in described
                ]
            yield [self._broadcast(tensor, self.size - 1 - turn) for tensor in tensors]

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        tensor = tensor.contiguous()
        with self._peers():
            # As bytes: backends do not know every dtype.
            for part in torch.split(tensor.view(-1).view(torch.uint8), _MOST_BYTES):
                dist.broadcast(part, source)
        return tensor

    # Agreeing

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, anything that can be pickled, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[T | None] = [None] * self.size
        with self._peers():
            dist.all_gather_object(found, value)
        return cast(list[T], found)

    def from_first(self, value: T | None) -> T:
        """Rank 0's `value`; the others may give any."""
        found = [value]
        if self.size == 1:
            return cast(T, value)
        with self._peers():
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return cast(T, found[0])

    def largest(self, value: Tensor) -> Tensor:
        """The largest of the ranks' `value`, a CPU tensor `[]`."""
        return torch.stack(self.gather(value)).amax(0)

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.gather(None)

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Raises an InputError from within, on whichever rank, on every one; rank 0 is to say it.

        Within, nothing is to be shared: a rank that fails would be missing there.
        """
        error = None
        try:
            yield
        except InputError as raised:
            error = raised
        self._agree(error, None)

    def _agree(self, error: InputError | None, value: T) -> list[T]:
        """Every rank's `value`; the InputError of the first rank that has one."""
        if error is not None and (self.size == 1 or isinstance(error, RankLostError)):
            raise error
        found = self.gather((None if error is None else str(error), value))
        for rank, (message, _) in enumerate(found):
            if message is not None:
                raise TogetherError(message if rank == 0 else f"rank {rank}: {message}") from error
        return [value for _, value in found]

    def require_same(self, facts: Mapping[str, Any], mend: str) -> None:
        """InputError where a rank has other `facts` than rank 0, naming the first difference."""
        found = self.gather(dict(facts))
        for rank, theirs in enumerate(found):
            key = first_difference(found[0], theirs)
            if key is not None:
                ours = found[0].get(key)
                raise TogetherError(f"rank {rank} has {key} = {theirs.get(key)!r} and rank 0 {ours!r}: {mend}")

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """What goes wrong here is not ours: another process closed its connection, or was silent for too long."""
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error)).split("\n")[0].split(". ")[0]  # without gloo's own file
            raise RankLostError(
                f"rank {self.rank} of {self.size}: another rank is gone ({reason}); what was committed is kept, "
                "and the same command continues, with any number of ranks"
            ) from error


def alone(device: torch.device) -> Ranks:
    """A process that shares with none."""
    return Ranks(0, 1, 1, device)


ALONE = alone(torch.device("cpu"))


def join_ranks(device: str) -> Ranks:
    """This process's place in the run that torchrun started, connected with the others; `device` as resolved.

    NCCL carries what lies on GPUs, gloo the rest. On GPUs every rank of a machine takes one of its own.
    """
    launch = read_launch()
    if launch.size == 1:
        return alone(torch.device(device))
    own = torch.device(device)
    if own.type == "cuda":
        own = _own_gpu(own, launch)
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=TIMEOUT)
    return Ranks(launch.rank, launch.size, launch.local_size, own)


def _own_gpu(device: torch.device, launch: Launch) -> torch.device:
    if device.index is not None:
        raise InputError(f"--device {device}: every rank takes a GPU of its own; say --device cuda")
    if launch.local_size > torch.cuda.device_count():
        raise InputError(
            f"{launch.local_size} ranks on a machine with {torch.cuda.device_count()} GPUs: "
            "start no more than one a GPU, or say --device cpu"
        )
    return torch.device("cuda", launch.local_rank)


def spans(count: int, unit: int, ranks: int) -> list[slice]:
    """`range(count)` in at most `ranks` slices of about equal length, cut at multiples of `unit` alone."""
    units = -(-count // unit)
    bounds = [min(count, unit * (units * i // ranks)) for i in range(ranks + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds) if stop > start]
