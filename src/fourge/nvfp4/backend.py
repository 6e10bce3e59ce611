"""Which loops compute: torch's on any device, or fused ones where they are installed. All give the same bits.

`quantize.py` and `methods/scale_search.py` hold the torch code, which says what is computed; a fused backend is a
module with the functions of `FusedLoops`. `auto` is the fused one for a tensor's device, where it can run. FP16 goes
through torch: only sources in FP16 hold it. Triton computes on CPU tensors too, slowly, in its interpreter:
TRITON_INTERPRET=1, to be set before anything imports it.
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

FUSED = {"cpu": "numba", "cuda": "triton"}
"""Device type → the backend that has loops for it."""

_FUSED_DTYPES = (torch.bfloat16, torch.float32)
_chosen = "auto"


class FusedLoops(Protocol):
    """What a backend computes; tensors of one device, `global_scale` FP32 `[]` or `[1]`, K a multiple of 16."""

    def amax(self, x: Tensor) -> Tensor:
        """See `quantize.amax`; a multiple of 16 values, not none."""

    def encode(self, weight: Tensor, global_scale: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """`packed` and `scale` of `quantize_weight`."""

    def decode(self, packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """See `dequantize_weight`."""

    def fake_quantize(self, x: Tensor, global_scale: Tensor) -> Tensor:
        """See `quantize.fake_quantize`; `x` `[T, K]`."""

    def squared_errors(
        self, weight: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `quantize.squared_errors`."""

    def search(self, weight: Tensor, global_scale: Tensor, h: Tensor, offsets: list[int]) -> Tensor:
        """Best scales of `weight`, FP16 too, under `h` `[K]`, FP32 `[N, K/16]`: `scale_search.py`."""

    def replay_group(
        self,
        weight: Tensor,
        fed: Tensor,
        feedback: Tensor,
        cost: Tensor,
        scales: Tensor,
        global_scale: Tensor,
        window: int,
        alternating: int,
        codes: Tensor,
        chosen: Tensor,
    ) -> None:
        """See `replay._replay_group`; FP32."""


def resolve(name: str, device_type: str) -> str:
    """`auto` resolved for a device; ValueError where the backend `name` has no loops for it or cannot run."""
    fused = FUSED.get(device_type, "torch")
    if name == "auto":
        return "torch" if _why_not(fused) else fused
    if name not in ("torch", fused) and not (name == "triton" and _interpreting()):
        raise ValueError(f"has no loops for {device_type}; use torch or auto")
    if why := _why_not(name):
        raise ValueError(why)
    return name


def choose(name: str) -> None:
    """Takes a backend for the rest of the process."""
    global _chosen
    _chosen = name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Takes a backend for a while."""
    before = _chosen
    choose(name)
    try:
        yield
    finally:
        choose(before)


def fused_loops(device: torch.device, dtype: torch.dtype) -> FusedLoops | None:
    """The fused loops for tensors of `dtype` on `device`; None where torch's own are to be used.

    A fused backend was chosen for one kind of device; tensors on another get what `auto` is there.
    """
    if _chosen == "torch" or dtype not in _FUSED_DTYPES:
        return None
    serves = _chosen == FUSED.get(device.type) or (_chosen == "triton" and _interpreting())
    name = resolve(_chosen if serves else "auto", device.type)
    return None if name == "torch" else _loops(name)


@cache
def _why_not(name: str) -> str | None:
    """What keeps a backend from running here, and the mend."""
    if importlib.util.find_spec(name) is None:
        return f"is not installed; pip install '{name}', or use torch"
    compilers = os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")
    if name == "triton" and not _interpreting() and not any(compilers):
        return "builds its launcher with a C compiler and finds none; install gcc, set CC, or use torch"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _loops(name: str) -> FusedLoops:
    return cast(FusedLoops, importlib.import_module(f"fourge.nvfp4.{name}_loops"))
