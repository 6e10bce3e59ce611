"""A layer's tensors go when the last name for them does: the garbage collector comes too late for them, or never."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fourge

OPTIONS: dict[str, Any] = {
    "calibration": "random",
    "num_calibration_samples": 40,
    "num_probe_samples": 2,
    "max_seq_length": 24,
    "threads": 1,
}


@pytest.fixture
def source(pico: Callable[..., Path]) -> str:
    return str(pico())


@pytest.fixture
def left_to_the_collector(source: str) -> Iterator[Callable[[], list[torch.Size]]]:
    """From now on, the shapes of tensors that nothing but the collector frees."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def found() -> list[torch.Size]:
        gc.collect()
        # Not isinstance, which asks a weak proxy for the class of what is gone.
        tensors = [x for x in gc.garbage if issubclass(type(x), torch.Tensor)]
        return [x.shape for x in tensors if x.device.type != "meta"]

    yield found
    gc.set_debug(0)
    gc.enable()
    gc.garbage.clear()


@pytest.mark.parametrize("method", ["max", "search", "gptq", "replay", "tuned"])
def test_quantize(
    method: str, source: str, tmp_path: Path, left_to_the_collector: Callable[[], list[torch.Size]]
) -> None:
    fourge.quantize(source, tmp_path / "out", method=method, smooth=True, kv_cache_scheme="fp8", **OPTIONS)
    assert left_to_the_collector() == []


def test_sensitivity(source: str, tmp_path: Path, left_to_the_collector: Callable[[], list[torch.Size]]) -> None:
    few = {name: value for name, value in OPTIONS.items() if name != "num_probe_samples"}
    fourge.sensitivity(source, tmp_path / "out", target_bits=5.0, **few)
    assert left_to_the_collector() == []
