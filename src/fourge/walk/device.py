"""Where a walk computes, in what arithmetic, with how many threads and whose loops."""

from typing import Any

import torch

from fourge.errors import InputError
from fourge.nvfp4 import backend as backends
from fourge.settings import Backend, ComputeDtype


def resolve_device(device: str, compute_dtype: ComputeDtype, threads: int) -> dict[str, Any]:
    """The options of these names with `auto` and 0 resolved; InputError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device} is not cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    if compute_dtype == "auto":
        compute_dtype = "float32" if kind == "cpu" else "bfloat16"
    return {"device": device, "compute_dtype": compute_dtype, "threads": threads or torch.get_num_threads()}


def resolve_backend(backend: Backend, device: str) -> str:
    """`auto` resolved for a resolved `device`, and taken for this process; InputError where it cannot be."""
    try:
        resolved = backends.resolve(backend, torch.device(device).type)
    except ValueError as error:
        raise InputError(f"--backend {backend} {error}") from error
    backends.choose(resolved)
    return resolved
