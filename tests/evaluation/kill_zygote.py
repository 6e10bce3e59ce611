"""Runs walks over fixed requests in forked children and kills them where it is told; started by test_walk_job.py.

Everything heavy is imported before the first fork. A child is killed with SIGKILL just before its n-th call of the
operations that a commit is made of. One JSON request a line on standard input, one JSON answer a line on standard
output: the scores, in hexadecimal floats, and the measures.
"""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.llama.modeling_llama

from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.requests import ScoreRequest, score_request
from fourge.nvfp4.backend import choose

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


def child(request: dict[str, Any], answer: int) -> None:
    torch.set_num_threads(1)
    count = kill_before(request.get("kill_before"))
    paths = (Path(request["model"]), Path(request["quantized"]), Path(request["folder"]))
    engine = WalkEngine(WalkSettings(*paths, "float32", "cpu", micro_batch_tokens=request.get("micro_batch_tokens")))
    requests = fixed_requests()
    scores = engine.score(requests)
    assert engine.outcome is not None and engine.outcome.kl_div is not None
    found = {role: [[scores[role][r.key][0].hex(), scores[role][r.key][1]] for r in requests] for role in engine.roles}
    report = {
        "operations": count[0],
        "scores": found,
        "kl_div": asdict(engine.outcome.kl_div),
        "bytes_read": engine.outcome.bytes_read,
        "continued": engine.outcome.continued,
    }
    os.write(answer, json.dumps(report).encode())
    os._exit(0)


def main() -> None:
    assert transformers.models.llama.modeling_llama
    choose("torch")  # fused loops would be loaded by every child anew
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), writer)
        os.close(writer)
        report = b"".join(iter(lambda reader=reader: os.read(reader, 4096), b""))
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        print(json.dumps({"killed_by": killed, **json.loads(report or b"{}")}), flush=True)


if __name__ == "__main__":
    main()
