"""Verification of a checkpoint with an FP8 KV cache: what is called for, what is damage, and what the lane computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_verify_damage import assert_only, failed

import fourge

K_SCALE = "model.layers.0.self_attn.k_scale"
V_SCALE = "model.layers.1.self_attn.v_scale"


@pytest.fixture
def with_cache(quantized: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    """Source and output; not to be written to."""
    return quantized(kv_cache_scheme="fp8")


@pytest.fixture
def damaged(copy: Callable[..., Any]) -> Any:
    """A copy to damage, without its job, whose digests would find anything."""
    made = copy(kv_cache_scheme="fp8")
    made.forget_job()
    return made


def edit_scheme(copy: Any, change: Callable[[dict[str, Any]], object]) -> None:
    copy.edit_json("config.json", lambda content: change(content["quantization_config"]))


def test_a_good_one_passes_every_check(with_cache: tuple[Path, Path]) -> None:
    source, output = with_cache
    report = fourge.verify(output, source=str(source), deep=True, threads=1)
    assert report.passed and all(check.status == "passed" for check in report.checks)
    details = {check.name: check.detail for check in report.checks}
    assert "KV cache fp8" in details["config"] and "KV cache" in details["scales"]
    recorded = json.loads((output / ".fourge" / "job.json").read_text())["result"]["fidelity"]["kl_div"]["mean"]
    assert report.fidelity is not None and report.fidelity["kl_div"]["mean"] == recorded


@pytest.mark.parametrize("name", [K_SCALE, V_SCALE])
def test_a_missing_scale(name: str, damaged: Any) -> None:
    damaged.replace(name, None)
    assert_only(damaged.verify(), "tensors", f"{name} is missing")


@pytest.mark.parametrize("value", [0.0, -0.5, float("inf"), float("nan")])
@pytest.mark.parametrize("name", [K_SCALE, V_SCALE])
def test_a_scale_that_engines_cannot_use(name: str, value: float, damaged: Any) -> None:
    damaged.replace(name, torch.tensor([value]))
    assert_only(damaged.verify(), "scales", f"{name} is {value}", "finite and above 0")


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (torch.tensor([1], dtype=torch.int32), "I32, expected BF16 or F16 or F32"),
        (torch.tensor([0.1], dtype=torch.float64), "F64, expected BF16 or F16 or F32"),
        (torch.ones(2), "shape [2], expected [1]"),
        (torch.ones(2, 1, 1), "shape [2, 1, 1], expected [1]"),
    ],
)
def test_a_scale_of_another_dtype_or_shape(new: torch.Tensor, said: str, damaged: Any) -> None:
    damaged.replace(K_SCALE, new)
    assert_only(damaged.verify(), "tensors", K_SCALE, said)


def test_scales_in_the_models_dtype_pass(damaged: Any) -> None:
    """As llm-compressor stores them."""
    for name in (K_SCALE, V_SCALE):
        damaged.change(name, lambda scale: scale.bfloat16())
    assert damaged.verify(source=str(damaged.source), deep=True, probe="random").passed


def test_scales_that_the_config_does_not_call_for(damaged: Any) -> None:
    edit_scheme(damaged, lambda config: config.update(kv_cache_scheme=None))
    found = failed(damaged.verify())
    assert list(found) == ["tensors"] and len(found["tensors"]) == 4
    assert all("not part of the model" in failure for failure in found["tensors"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_bits", 4),
        ("type", "int"),
        ("symmetric", False),
        ("strategy", "attn_head"),
        ("strategy", None),
        ("dynamic", True),
    ],
)
def test_a_scheme_that_is_not_known(key: str, value: object, damaged: Any) -> None:
    edit_scheme(damaged, lambda config: config["kv_cache_scheme"].update({key: value}))
    found = failed(damaged.verify())
    assert any(f"kv_cache_scheme.{key} is {value!r}" in failure for failure in found["config"])


@pytest.mark.parametrize("value", ["fp8", 8, []])
def test_a_scheme_that_is_no_object(value: object, damaged: Any) -> None:
    edit_scheme(damaged, lambda config: config.update(kv_cache_scheme=value))
    assert any("expected an object" in failure for failure in failed(damaged.verify())["config"])


def test_keys_that_older_writers_add_pass(damaged: Any) -> None:
    """llm-compressor 0.14's own wording."""
    more = {"actorder": None, "block_structure": None, "group_size": None, "observer": None, "observer_kwargs": {}}
    edit_scheme(
        damaged, lambda config: config["kv_cache_scheme"].update(more | {"scale_dtype": None, "zp_dtype": None})
    )
    assert damaged.verify().passed


def test_a_scale_a_thousand_times_too_small_is_found_by_walking(copy: Callable[..., Any]) -> None:
    """Every number of the file is legal; only what the lane then computes is wrong: nearly all keys saturate."""
    damaged = copy(kv_cache_scheme="fp8")
    damaged.change(K_SCALE, lambda scale: scale / 1000)
    found = failed(damaged.verify(source=str(damaged.source), deep=True))
    assert found.keys() == {"digests", "deep"} and "the job recorded" in found["deep"][-1]
