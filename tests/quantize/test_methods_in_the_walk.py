"""Methods as `fourge quantize` runs them: what may decide, what is recorded, and that the better ones are better."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourge
from fourge.errors import InputError
from fourge.methods import METHODS

OPTIONS: dict[str, Any] = {
    "calibration": "random",
    "num_calibration_samples": 12,
    "num_probe_samples": 2,
    "max_seq_length": 12,
    "threads": 1,
}


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


def events(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / ".fourge" / "job.json").read_text())["result"]["events"]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_probe_decides_nothing(method: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    """Another probe, a longer one, none at all: the same calibration gives the same bytes."""
    outputs = [tmp_path / str(probes) for probes in (0, 2, 7)]
    for output in outputs:
        probes = int(output.name)
        fourge.quantize(str(pico()), output, method=method, **(OPTIONS | {"num_probe_samples": probes}))
    assert shards(outputs[0]) == shards(outputs[1]) == shards(outputs[2])


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_better_methods_are_closer_to_bf16(scheme: Any, pico: Callable[..., Path], tmp_path: Path) -> None:
    """The hidden states' error on held-out tokens after the last layer: search below max, gptq and replay below both.

    (Which of the last two is ahead is within the noise of a model this small and as random as this one.)
    """
    errors = {}
    for method in ("max", "search", "gptq", "replay"):
        output = tmp_path / method
        settings = OPTIONS | {"num_calibration_samples": 100, "num_probe_samples": 50, "max_seq_length": 24}
        fourge.quantize(str(pico()), output, method=method, scheme=scheme, **settings)
        steps = json.loads((output / ".fourge" / "job.json").read_text())["steps"]
        errors[method] = steps[2]["measures"]["hidden_error"]["mean"]
    assert errors["search"] < 0.99 * errors["max"]
    assert max(errors["gptq"], errors["replay"]) < 0.97 * errors["search"]


@pytest.mark.parametrize("method", ["gptq", "replay"])
def test_too_few_tokens_fall_back_and_say_so(method: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    """36 tokens are fewer than 64 columns: what is written is the weighted search's, and every group is named."""
    few = OPTIONS | {"num_calibration_samples": 3}
    result = fourge.quantize(str(pico()), tmp_path / method, method=method, **few)
    assert result.events == 8
    assert {event["event"] for event in events(tmp_path / method)} == {
        "fewer tokens than columns: weighted search instead"
    }


@pytest.mark.parametrize("method", ["gptq", "replay"])
def test_no_data_is_refused_where_the_method_needs_it(method: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs data"):
        fourge.quantize(str(pico()), tmp_path / "out", method=method, scheme="NVFP4A16")
    fourge.quantize(str(pico()), tmp_path / "out", method="search", scheme="NVFP4A16")
