"""Compensation in the walk: nearer to BF16 on held-out tokens, however it is served, decided on validation tokens."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fourge
import fourge.walk.choices
import fourge.walk.compensation
import fourge.walk.layer_step
from fourge.checkpoint.architecture import ARCHITECTURES
from fourge.methods.tuned import Compensated, Judge
from fourge.walk.compensation import GroupTap, output_norms, short_of
from fourge.walk.observers import SeenEnoughError

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fidelity_eval

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
    for method in ("replay", "tuned"):
        fourge.quantize(str(pico(architecture)), tmp_path / method, method=method, **OPTIONS)
        errors[method] = measures(tmp_path / method)[-1]["hidden_error"]["mean"]
    assert errors["tuned"] < 0.98 * errors["replay"]
    kept = 0
    for layer in measures(tmp_path / "tuned"):
        assert len(layer["compensation"]) == 4
        for entry in layer["compensation"].values():
            before, after = entry["validation_error"]
            assert entry["kept"] == (after < before) == (entry["strength"] is not None)
            kept += entry["kept"]
    assert kept >= 6
    assert fourge.verify(tmp_path / "tuned", source=str(pico(architecture)), deep=True, threads=1).passed


def test_where_nothing_is_kept_the_source_s_weights_are_rounded(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compensate = fourge.walk.compensation.compensate

    def misjudged(weights: Any, hessian: Any, cross: Any, judge: Judge, *, whole: bool) -> Compensated:
        return compensate(weights, hessian, cross, Judge(-judge.shortfall, judge.inputs), whole=whole)

    def kept_out(weights: Any, *rest: Any, whole: bool) -> Compensated:
        return Compensated(dict(weights), None, 1.0)

    for name, stand_in in (("misjudged", misjudged), ("kept_out", kept_out)):
        monkeypatch.setattr(fourge.walk.compensation, "compensate", stand_in)
        fourge.quantize(str(pico()), tmp_path / name, method="tuned", **OPTIONS)
    decided = [entry for layer in measures(tmp_path / "misjudged") for entry in layer["compensation"].values()]
    assert decided and not any(entry["kept"] for entry in decided)
    for path in (tmp_path / "kept_out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "misjudged" / path.name).read_bytes()


def test_it_looks_at_weight_only_engines_too(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by transformers: fitted in the lane that rounds inputs alone, it would harm the one that does not."""
    options = OPTIONS | {"num_calibration_samples": 300, "num_probe_samples": 25}
    every_lane = fourge.walk.layer_step.GroupLanes

    def without_the_second(*arguments: Any) -> Any:
        *others, served = arguments
        assert [lane.lane for lane in served] == ["nvfp4", "nvfp4a16"]
        return every_lane(*others, served[:1])

    divergence = {}
    for name, lanes in (("both", every_lane), ("one", without_the_second)):
        monkeypatch.setattr(fourge.walk.layer_step, "GroupLanes", lanes)
        output = tmp_path / name
        fourge.quantize(str(pico()), output, method="tuned", **options)
        tokens = output / ".fourge" / "tokens.safetensors"
        scores = fidelity_eval.evaluate(str(pico()), str(output), tokens, tmp_path / "cache")
        divergence[name] = scores["W4A16"]["kl"][0]
    assert divergence["both"] < 0.8 * divergence["one"]


class StandInLayer:
    """Hands over the residual stream as a layer does."""

    def observe_input(self, _: str, see: Callable[[torch.Tensor], None]) -> None:
        self.see = see


def tap_that_saw(x: torch.Tensor, residual: torch.Tensor) -> GroupTap:
    tap, layer = GroupTap(ARCHITECTURES["LlamaForCausalLM"].groups[1]), StandInLayer()
    tap.attach(layer)  # type: ignore[arg-type]
    layer.see(residual)
    with pytest.raises(SeenEnoughError):
        tap.site(x)
    return tap


def test_a_loud_token_counts_as_the_others_do() -> None:
    """A thousand times its input and its residual in either lane: the same shortfall relative to the stream."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    x, residual = torch.randn(5, 32, generator=generator), torch.randn(5, 24, generator=generator)
    q, drifted = x + 0.1 * torch.randn(5, 32, generator=generator), 0.9 * residual
    loudness = torch.tensor([1, 1000, 1, 0, 1])[:, None]
    sources, served = tap_that_saw(x, residual), tap_that_saw(q, drifted)
    shortfall, inputs = short_of(sources, served, weight, output_norms(sources, weight))
    sources, served = tap_that_saw(loudness * x, loudness * residual), tap_that_saw(loudness * q, loudness * drifted)
    loud_shortfall, loud_inputs = short_of(sources, served, weight, output_norms(sources, weight))
    silent = loudness == 0
    assert torch.allclose(loud_shortfall, shortfall.masked_fill(silent, 0), atol=1e-6)
    assert torch.allclose(loud_inputs, inputs.masked_fill(silent, 0), atol=1e-6)
    output, norms = x @ weight.T + residual, (x @ weight.T + residual).norm(dim=1, keepdim=True)
    assert torch.allclose(shortfall * norms, output - (q @ weight.T + drifted), atol=1e-5)


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


def test_a_linear_too_wide_to_be_compensated_is_replayed(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`down_proj` here, as if a recipe file had said so."""
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"rules": [{"targets": "re:.*down_proj", "method": "replay"}]}))
    fourge.quantize(str(pico()), tmp_path / "asked", method="tuned", recipe_file=rules, **OPTIONS)
    monkeypatch.setattr(fourge.walk.choices, "MOST_COLUMNS", 64)
    fourge.quantize(str(pico()), tmp_path / "too wide", method="tuned", **OPTIONS)
    events = json.loads((tmp_path / "too wide" / "fourge.json").read_text())["events"]
    told = {"event": "too wide to be compensated: replay", "group": "mlp.down_proj"}
    assert [told.items() <= event.items() for event in events] == [True, True]
    for path in (tmp_path / "asked").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "too wide" / path.name).read_bytes()
