"""Runs quantizations by several ranks, which it forks, as torchrun would start them; started once by test_ranks.py.

Everything heavy is imported before the first fork. What is cut into blocks is cut much finer than usual, so that a
pico model has some for every rank. One JSON request a line on standard input, one JSON answer a line on standard
output.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama

import fourge
import fourge.methods.hessian
import fourge.methods.tuned
import fourge.walk.finish
import fourge.walk.head
import fourge.walk.row_split
import fourge.walk.steps
import fourge.walk.walk


def cut_finely() -> None:
    fourge.methods.hessian._COLUMNS_PER_BLOCK = 16
    fourge.methods.tuned._ROWS_SUMMED = 16
    fourge.walk.row_split._ROWS_ON_CPU = 16
    fourge.walk.head.ROWS = fourge.walk.walk.ROWS = 8


def die_before_write(number: int) -> None:
    """SIGKILL before this process's call `number` of `pwrite`."""
    original, count = os.pwrite, 0

    def counted(*args: Any) -> int:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    os.pwrite = counted


def rank(request: dict[str, Any], number: int, port: int, answer: int) -> None:
    size = request["ranks"]
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cut_finely()
    if request.get("kill_rank") == number:
        die_before_write(request["kill_before_write"])
    options = request["options"] | request.get("of_rank", {}).get(str(number), {})
    try:
        result = fourge.quantize(request["model"], Path(request["output"]), **options)
        report = {"kl_div": result.fidelity["kl_div"]["mean"]}
    except fourge.InputError as error:
        report = {"error": type(error).__name__, "message": str(error)}
    os.write(answer, json.dumps(report).encode())
    os._exit(0)


def run(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of every rank: its result, its error, or the signal that killed it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for number in range(request["ranks"]):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            rank(request, number, port, writer)
        os.close(writer)
        started.append((pid, reader))
    answers = []
    for pid, reader in started:
        report = b"".join(iter(lambda reader=reader: os.read(reader, 4096), b""))
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        killed = {"killed_by": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {}
        answers.append(killed | json.loads(report or b"{}"))
    return answers


def main() -> None:
    assert transformers.models.llama.modeling_llama
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
