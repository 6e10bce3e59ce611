"""How this process was started: alone, or as one of several ranks under torchrun, which says so in the environment."""

import os
from dataclasses import dataclass

from fourge.errors import InputError


@dataclass(frozen=True)
class Launch:
    """This process's number among all, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_launch() -> Launch:
    """What torchrun's variables say; a process alone where there are none, or one rank only."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set and {', '.join(missing)} not: start several ranks with torchrun")
    return Launch(*(int(os.environ[name]) for name in names))
