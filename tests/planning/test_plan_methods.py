"""A plan of a quantization, held against the quantization itself, whatever the method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode
from written_configs import plan

import fourge
from fourge.walk import run as walk_run
from fourge.walk.resources import Needs

SAMPLES = {"num_calibration_samples": 12, "num_validation_samples": 8, "num_probe_samples": 2, "max_seq_length": 16}
METHODS: list[dict[str, Any]] = [
    {"method": "max"},
    {"recipe": "balanced"},
    {"recipe": "best"},
    {"method": "tuned"},
    {"method": "max", "kv_cache_scheme": "fp8"},
    {"scheme": "NVFP4A16"},
]


def quantize(source: Path, output: Path, **options: Any) -> None:
    calibration = None if options.get("scheme") == "NVFP4A16" else "random"
    fourge.quantize(str(source), output, calibration=calibration, threads=1, device="cpu", **SAMPLES, **options)


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(options.values()))
def test_the_plan_is_what_quantize_asks_for(
    options: dict[str, Any], pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Needs] = []
    monkeypatch.setattr(walk_run, "require_resources", lambda needs, *rest: asked.append(needs))
    quantize(pico(), tmp_path / "out", **options)
    cost = plan(pico(), **SAMPLES, **options).quantizing
    assert cost is not None
    assert cost.host_memory.needed == asked[-1].memory
    assert cost.disk.needed == asked[-1].disk
    assert cost.disk_hidden_states == 2 * asked[-1].hidden


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_the_lanes_arithmetic_is_what_torch_counts(method: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    """Of a whole run. torch counts no attention on a CPU, and none of the Hessians' products in place."""
    with FlopCounterMode(display=False) as counter:
        quantize(pico(), tmp_path / "out", method=method)
    cost = plan(pico(), method=method, **SAMPLES).quantizing
    assert cost is not None
    lanes = cost.work.flop_bf16_lane + cost.work.flop_nvfp4_lane
    assert counter.get_total_flops() == pytest.approx(lanes, rel=0.05)
    assert (cost.work.flop_curvature > 0) == (method == "gptq")
