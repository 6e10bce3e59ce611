"""A smoothed checkpoint beside its source: held against what the job recorded, and refused without the record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_verify_damage import failed

import fourge
from fourge.walk.folding import decode_exponents, encode_exponents

NORM = "model.layers.0.post_attention_layernorm.weight"
NORM_FEEDS = "mlp.gate_proj+up_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"
UP_FEEDS = "mlp.down_proj"


SMOOTHED = {"smooth": True, "attention_bias": True, "mlp_bias": True}


@pytest.fixture
def smoothed(quantized: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    """Source, with biases, and output; not to be written to."""
    source, output = quantized(**SMOOTHED)
    for step, group in ((1, NORM_FEEDS), (2, UP_FEEDS)):
        assert job(output)["steps"][step]["measures"]["smoothing"][group]["kept"]
    return source, output


@pytest.fixture
def damaged(copy: Callable[..., Any]) -> Any:
    """A copy to damage, with its job."""
    return copy(**SMOOTHED)


def job(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / ".fourge" / "job.json").read_text())
    return content


def edit_record(copy: Any, step: int, group: str, change: Callable[[dict[str, Any]], object]) -> None:
    copy.edit_json(".fourge/job.json", lambda j: change(j["steps"][step]["measures"]["smoothing"][group]))


def shift_first(entry: dict[str, Any]) -> None:
    """Another exponent for the first channel."""
    exponents = decode_exponents(entry["exponents"])
    exponents[0] += 3
    entry["exponents"] = encode_exponents(exponents)


def test_a_good_one_passes_every_check(smoothed: tuple[Path, Path]) -> None:
    source, output = smoothed
    report = fourge.verify(output, source=str(source), deep=True, threads=1)
    assert {check.status for check in report.checks} == {"passed"}
    details = {check.name: check.detail for check in report.checks}
    assert "recorded powers of two" in details["unquantized"]
    assert "the job recorded" in details["deep"]


@pytest.mark.parametrize("without", ["job", "setting"])
def test_without_the_record_it_is_refused(damaged: Any, without: str) -> None:
    """Without a job, and with one that says nothing of smoothing: the norms are not the source's, nor the weights."""
    if without == "job":
        damaged.forget_job()
    else:
        damaged.edit_json(".fourge/job.json", lambda content: content["settings"].update(smooth=False))
    found = failed(damaged.verify(source=str(damaged.source)))
    assert found.keys() == {"unquantized", "dequantized"}
    assert any(NORM in failure for failure in found["unquantized"])


def test_a_scaled_norm_that_is_not_what_was_recorded(damaged: Any) -> None:
    def double(norm: torch.Tensor) -> torch.Tensor:
        norm[3] *= 2
        return norm

    damaged.change(NORM, double)
    assert failed(damaged.verify(source=str(damaged.source))).keys() == {"digests", "unquantized"}


def test_another_exponent_for_a_norm(damaged: Any) -> None:
    edit_record(damaged, 1, NORM_FEEDS, shift_first)
    found = failed(damaged.verify(source=str(damaged.source)))
    assert NORM in found["unquantized"][0]


def test_another_exponent_for_rows(damaged: Any) -> None:
    """up_proj's bias is held to the bit, its weight and down_proj's by their errors."""

    def shift_all(entry: dict[str, Any]) -> None:
        entry["exponents"] = encode_exponents(decode_exponents(entry["exponents"]) + 2)

    edit_record(damaged, 2, UP_FEEDS, shift_all)
    found = failed(damaged.verify(source=str(damaged.source)))
    assert any(f"{UP_PROJ}.bias" in failure for failure in found["unquantized"])
    assert any(UP_PROJ in failure for failure in found["dequantized"])


def test_rows_that_are_not_scaled_as_recorded(damaged: Any) -> None:
    damaged.change(f"{UP_PROJ}.weight_scale", lambda scale: (scale.float() * 2).clamp(max=448).to(scale.dtype))
    found = failed(damaged.verify(source=str(damaged.source)))
    assert found.keys() == {"digests", "dequantized"}
    assert UP_PROJ in found["dequantized"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(exponents="AAAA"),
        lambda entry: entry.update(exponents="?"),
        lambda entry: entry.update(exponents=7),
        lambda entry: entry.pop("exponents"),
        lambda entry: entry.pop("kept"),
    ],
)
def test_a_damaged_record_is_named(damaged: Any, change: Callable[[dict[str, Any]], object]) -> None:
    edit_record(damaged, 1, NORM_FEEDS, change)
    found = failed(damaged.verify(source=str(damaged.source)))
    assert found["unquantized"][0].startswith(f"job.json: what it says of smoothing model.layers.0.{NORM_FEEDS}")


def test_another_unquantized_tensor_must_still_be_the_source_s(damaged: Any) -> None:
    damaged.change("model.layers.0.self_attn.q_proj.bias", lambda bias: bias * 2)
    found = failed(damaged.verify(source=str(damaged.source)))
    assert found.keys() == {"digests", "unquantized"}


def test_a_source_of_another_shape_is_a_failure_not_a_crash(damaged: Any, pico: Callable[..., Path]) -> None:
    other = pico("llama", attention_bias=True, mlp_bias=True, hidden_size=32)
    found = failed(damaged.verify(source=str(other)))
    assert {"unquantized", "dequantized"} <= found.keys()
