"""The machine that a walk runs on: what a reader of its times must know, and nothing that says whose it is."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")


def describe_machine(device: torch.device | str) -> dict[str, Any]:
    """`cpu` (the model), `cpus` (logical ones that this process may use), `memory_bytes`; on CUDA, `gpu` and
    `gpu_memory_bytes` too. No host, no user, no path."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = memory_limit()
    total = int(psutil.virtual_memory().total)
    found = {"cpu": _cpu_model(), "cpus": usable, "memory_bytes": total if limit is None else min(total, limit)}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return found


def device_peak(device: torch.device) -> dict[str, int]:
    """The most that torch ever held on a GPU, in bytes; nothing on a CPU, whose peak is the process's."""
    return {"peak_gpu_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def memory_limit() -> int | None:
    """Bytes that this process's control group may take; None without a limit."""
    limit = _CGROUP / "memory.max"
    text = limit.read_text().strip() if limit.is_file() else "max"
    return None if text == "max" else int(text)


def memory_in_use() -> int:
    """Bytes that the control group takes now; 0 without one."""
    usage = _CGROUP / "memory.current"
    return int(usage.read_text()) if usage.is_file() else 0


def _cpu_model() -> str:
    """As Linux names it, else as Python knows the processor, else its architecture."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
