"""Compensation in the walk: nearer to BF16 on held-out tokens, decided on validation tokens, and otherwise GPTQ."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourge
import fourge.walk.compensation
from fourge.methods.tuned import Compensated, Judge

OPTIONS: dict[str, Any] = {
    "calibration": "random",
    "num_calibration_samples": 100,
    "num_probe_samples": 50,
    "max_seq_length": 24,
    "threads": 1,
}


def measures(output: Path) -> list[dict[str, Any]]:
    """What job.json records of every decoder layer."""
    steps = json.loads((output / ".fourge" / "job.json").read_text())["steps"]
    return [step["measures"] for step in steps[1:-1]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_it_brings_the_model_closer_to_bf16(architecture: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    errors = {}
    for method in ("gptq", "tuned"):
        fourge.quantize(str(pico(architecture)), tmp_path / method, method=method, **OPTIONS)
        errors[method] = measures(tmp_path / method)[-1]["hidden_error"]["mean"]
    assert errors["tuned"] < 0.98 * errors["gptq"]
    kept = 0
    for layer in measures(tmp_path / "tuned"):
        assert len(layer["compensation"]) == 4
        for entry in layer["compensation"].values():
            before, after = entry["validation_error"]
            assert entry["kept"] == (after < before) == (entry["strength"] is not None)
            kept += entry["kept"]
    assert kept >= 6
    assert fourge.verify(tmp_path / "tuned", source=str(pico(architecture)), deep=True, threads=1).passed


def test_where_nothing_is_kept_the_output_is_gptq_s(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compensate = fourge.walk.compensation.compensate

    def misjudged(weights: Any, hessian: Any, cross: Any, judge: Judge, *, whole: bool) -> Compensated:
        return compensate(weights, hessian, cross, Judge(-judge.shortfall, judge.inputs), whole=whole)

    monkeypatch.setattr(fourge.walk.compensation, "compensate", misjudged)
    for method in ("gptq", "tuned"):
        fourge.quantize(str(pico()), tmp_path / method, method=method, **OPTIONS)
    assert not any(entry["kept"] for layer in measures(tmp_path / "tuned") for entry in layer["compensation"].values())
    for path in (tmp_path / "gptq").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "tuned" / path.name).read_bytes()


def test_other_validation_tokens_are_other_judges(pico: Callable[..., Path], tmp_path: Path) -> None:
    """What is fitted stays the same, and what it is judged by does not."""
    errors = []
    for count in (2, 20):
        output = tmp_path / str(count)
        fourge.quantize(str(pico()), output, method="tuned", num_validation_samples=count, **OPTIONS)
        errors.append([entry["validation_error"] for entry in measures(output)[0]["compensation"].values()])
    assert errors[0] != errors[1]


def test_weights_alone(pico: Callable[..., Path], tmp_path: Path) -> None:
    """Weight-only, with data and an FP8 cache: what is compensated is what the layers before did."""
    options = OPTIONS | {"scheme": "NVFP4A16", "kv_cache_scheme": "fp8"}
    fourge.quantize(str(pico()), tmp_path / "out", method="tuned", smooth=True, **options)
    first, second = measures(tmp_path / "out")
    assert not first["compensation"]["self_attn.q_proj+k_proj+v_proj"]["kept"], "nothing is quantized before it"
    assert any(entry["kept"] for entry in second["compensation"].values())
    assert fourge.verify(tmp_path / "out", source=str(pico()), deep=True, threads=1).passed
