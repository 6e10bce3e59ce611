"""Runs walks over fixed requests in forked children and kills them where it is told; started by test_walk_job.py.

Everything heavy is imported before the first fork. A child is killed with SIGKILL just before its n-th call of the
operations that a commit is made of. One JSON request a line on standard input, one JSON answer a line on standard
output: the scores, in hexadecimal floats, and the measures.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.llama.modeling_llama

import fourge.evaluation.scoring_walk
import fourge.walk.head
from fourge.errors import InputError
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.following import follow, leading
from fourge.evaluation.requests import ScoreRequest, score_request
from fourge.nvfp4.backend import choose
from fourge.walk.ranks import Ranks, join_ranks

OPERATIONS = ("fsync", "replace", "unlink", "pwrite")


def kill_before(number: int | None) -> list[int]:
    """Counts calls of `OPERATIONS` in this process; SIGKILL just before call `number`."""
    count = [0]

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def counted(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(os, name, counted)

    for name in OPERATIONS:
        wrap(name)
    return count


def fixed_requests() -> list[ScoreRequest]:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 128, 20).tolist()
    return [
        score_request([*shared[: 10 + 3 * i], i + 3], rng.integers(3, 128, count).tolist(), 64)
        for i in range(4)
        for count in (1, 1, 3)
    ]


def score(request: dict[str, Any], ranks: Ranks | None, count: list[int]) -> dict[str, Any]:
    paths = (Path(request["model"]), Path(request["quantized"]), Path(request["folder"]))
    budget = request.get("micro_batch_tokens")
    engine = WalkEngine(WalkSettings(*paths, "float32", "cpu", micro_batch_tokens=budget, ranks=ranks))
    requests = fixed_requests()
    scores = engine.score(requests)
    assert engine.outcome is not None and engine.outcome.kl_div is not None
    found = {role: [[scores[role][r.key][0].hex(), scores[role][r.key][1]] for r in requests] for role in engine.roles}
    return {
        "operations": count[0],
        "scores": found,
        "kl_div": asdict(engine.outcome.kl_div),
        "bytes_read": engine.outcome.bytes_read,
        "continued": engine.outcome.continued,
    }


def child(request: dict[str, Any], answer: int) -> None:
    """This process alone; or with `rank` in the request, as torchrun would start it among `ranks`."""
    torch.set_num_threads(1)
    rank = request.get("rank", 0)
    count = kill_before(request.get("kill_before") if rank == request.get("kill_rank", 0) else None)
    try:
        if "ranks" in request:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"])}
            os.environ |= {"LOCAL_WORLD_SIZE": str(request["ranks"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
            fourge.walk.head.ROWS = fourge.evaluation.scoring_walk.ROWS = 4
            ranks = join_ranks("cpu")
            if ranks.first:
                with leading(ranks):
                    report = score(request, ranks, count)
            else:
                follow(ranks)
                report = {}
        else:
            report = score(request, None, count)
    except InputError as error:
        report = {"error": type(error).__name__, "message": str(error)}
    os.write(answer, json.dumps(report).encode())
    os._exit(0)


def start(request: dict[str, Any]) -> tuple[int, int]:
    """A child's number, and where its report is to be read."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(request, writer)
    os.close(writer)
    return pid, reader


def finish(pid: int, reader: int) -> dict[str, Any]:
    report = b"".join(iter(lambda: os.read(reader, 4096), b""))
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return {"killed_by": killed, **json.loads(report or b"{}")}


def answer_of(request: dict[str, Any]) -> Any:
    """What became of a process alone, or of every rank, in a list."""
    if "ranks" not in request:
        return finish(*start(request))
    with socket.create_server(("127.0.0.1", 0)) as free:
        request["port"] = free.getsockname()[1]
    return [finish(*started) for started in [start(request | {"rank": rank}) for rank in range(request["ranks"])]]


def main() -> None:
    assert transformers.models.llama.modeling_llama
    choose("torch")  # fused loops would be loaded by every child anew
    for line in sys.stdin:
        print(json.dumps(answer_of(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
