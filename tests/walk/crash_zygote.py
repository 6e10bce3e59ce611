"""Runs quantizations in forked children and kills them where it is told; started once by test_crash.py.

Everything heavy is imported before the first fork, so a run costs what a pico model costs. A child is killed with
SIGKILL from within, just before its n-th call of the operations that a commit is made of, or from outside after a
time. One JSON request a line on standard input, one JSON answer a line on standard output.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama

import fourge
import fourge.walk.finish
import fourge.walk.steps

OPERATIONS = ("fsync", "replace", "unlink", "pwrite")


def count_operations(kill_before: int | None) -> Callable[[], int]:
    """Counts calls of `OPERATIONS` in this process; SIGKILL just before call number `kill_before`."""
    count = 0
    counting = threading.Lock()  # shards are written by a thread

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal count
            with counting:
                count += 1
                if count == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(os, name, counted)

    for name in OPERATIONS:
        wrap(name)
    return lambda: count


def child(request: dict[str, Any], answer: int) -> None:
    torch.set_num_threads(1)
    operations = count_operations(request.get("kill_before"))
    if request.get("kill_after"):
        timer = threading.Timer(request["kill_after"], lambda: os.kill(os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    began = time.monotonic()
    fourge.quantize(request["model"], Path(request["output"]), **request["options"])
    report = {"operations": operations(), "seconds": time.monotonic() - began}
    os.write(answer, json.dumps(report).encode())
    os._exit(0)


def main() -> None:
    assert transformers.models.llama.modeling_llama
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            child(request, writer)
        os.close(writer)
        report = b"".join(iter(lambda reader=reader: os.read(reader, 4096), b""))
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        print(json.dumps({"killed_by": killed, **json.loads(report or b"{}")}), flush=True)


if __name__ == "__main__":
    main()
