"""Parts of the verification against figures worked out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fourge.checkpoint.architecture import find_architecture
from fourge.checks.config import check_config
from fourge.checks.deep import judge
from fourge.checks.expected import expect
from fourge.checks.report import conclude
from fourge.checks.source import allowed_error
from fourge.checks.structure import check_tensor_parallel
from fourge.walk.head import Fidelity, KlHistogram
from fourge.walk.statistics import Estimate
from fourge.walk.weight_error import RelativeError

LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
QWEN2_7B = LLAMA_405B | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SMOLLM2_135M = LLAMA_405B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# One KV head of 16 rows: copied to every rank, never cut.
MULTI_QUERY = LLAMA_405B | {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
}


def quantization_config() -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme("NVFP4", ["Linear"])},
        ignore=["lm_head"],
        format="nvfp4-pack-quantized",
        quantization_status="compressed",
    )
    dumped: dict[str, Any] = json.loads(config.model_dump_json())
    return dumped


@pytest.mark.parametrize(
    ("model", "sizes", "why"),
    [
        # 53248 / 32 = 1664 = 52 · 32 columns a rank; 128 heads over 32 ranks, 8 KV heads copied to 4 ranks each.
        (LLAMA_405B, "1, 2, 4, 8, 16, 32", None),
        # 18944 / 4 = 4736 = 148 · 32; 28 heads do not divide by 8.
        (QWEN2_7B, "1, 2, 4", "not 8: 28 attention heads"),
        (SMOLLM2_135M, "1", "not 2: 9 attention heads"),
        (MULTI_QUERY, "1, 2, 4, 8, 16, 32", None),
        # 3584 / 4 = 896 = 28 · 32 for o_proj, but 2112 / 4 = 528 = 16.5 · 32 for down_proj.
        (QWEN2_7B | {"intermediate_size": 2112}, "1, 2", "not 4: model.layers.0.mlp.down_proj has 528"),
    ],
)
def test_tensor_parallel_sizes(model: dict[str, Any], sizes: str, why: str | None, tmp_path: Path) -> None:
    config = model | {"quantization_config": quantization_config()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, quantization = check_config(config)
    assert quantization is not None
    check = check_tensor_parallel(expect(tmp_path, find_architecture(config), quantization))
    assert check.status == "passed"
    works, _, hindered = check.detail.partition("; ")
    assert works == f"tensor-parallel size {sizes}"
    assert hindered.startswith(why) if why else not hindered


@pytest.mark.parametrize("key", ["targets", "ignore"])
@pytest.mark.parametrize("value", ["Linear", [1], {"a": 1}])
def test_patterns_must_be_lists_of_strings(key: str, value: object) -> None:
    stored = quantization_config()
    (stored["config_groups"]["group_0"] if key == "targets" else stored)[key] = value
    check, quantization = check_config({"quantization_config": stored})
    assert check.status == "failed" and quantization is None
    assert any(key in failure for failure in check.failures)


@pytest.mark.parametrize("stored", [None, [], "NVFP4", {}, {"config_groups": [1]}, {"config_groups": {"a": None}}])
def test_a_quantization_config_of_any_other_shape_fails(stored: object) -> None:
    check, quantization = check_config({"quantization_config": stored})
    assert check.status == "failed" and check.failures and quantization is None


@pytest.mark.parametrize("key", ["kv_cache_scheme", "transform_config"])
def test_what_adds_to_the_files_is_said_to_be_unknown(key: str) -> None:
    stored = quantization_config() | {key: {"num_bits": 8, "type": "float"}}
    check, _ = check_config({"quantization_config": stored})
    assert check.status == "failed" and key in check.failures[0]


def fidelity(kl_div: float) -> Fidelity:
    estimate = Estimate(kl_div, 0.01, 100)
    return Fidelity(estimate, estimate, estimate, estimate, estimate, KlHistogram(0, [100]))


@pytest.mark.parametrize(
    ("kl_div", "recorded", "passes"),
    [
        (0.05, None, True),
        (1.0, None, True),
        (1.001, None, False),
        (math.nan, None, False),
        (math.inf, None, False),
        (0.05, 0.05, True),
        (0.05, 0.0504, True),
        (0.05, 0.0506, False),
        (0.05, 0.0494, False),
        (0.0, 1e-6, True),
        (0.0, 1e-5, False),
        (1.2, 1.2, False),
        (math.nan, 0.05, False),
    ],
)
def test_which_kl_passes(kl_div: float, recorded: float | None, passes: bool) -> None:
    check = judge(replace(fidelity(0.1), kl_div=Estimate(kl_div, None, 100)), recorded)
    assert (check.status == "passed") == passes
    assert bool(check.failures) != passes


def test_a_coin_toss_between_neighbours_is_what_the_bound_allows() -> None:
    """On a uniform grid of step 1: nearest has a mean square of 1/12, either neighbour by chance 1/3."""
    torch.manual_seed(0)
    weight = torch.rand(1000, 1000, dtype=torch.float64) * 100
    tossed = weight.floor() + torch.randint(0, 2, weight.shape)
    nearest, chance = RelativeError(), RelativeError()
    nearest.add((weight.round() - weight).square(), weight.square())
    chance.add((tossed - weight).square(), weight.square())
    assert chance.value / nearest.value == pytest.approx(2, rel=5e-3)
    assert allowed_error(nearest.value) >= 2 * nearest.value


def test_relative_error_of_blocks_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    other = weight + 0.1 * torch.randn(64, 32)
    error = RelativeError()
    for start in (0, 10, 40):
        stop = {0: 10, 10: 40, 40: 64}[start]
        error.add((other - weight)[start:stop].double().square(), weight[start:stop].double().square())
    assert error.value == pytest.approx(float((other - weight).double().norm() / weight.double().norm()), rel=1e-9)


@pytest.mark.parametrize(("difference", "expected"), [(0.0, 0.0), (1.0, math.inf)])
def test_relative_error_of_nothing(difference: float, expected: float) -> None:
    error = RelativeError()
    error.add(torch.full((2, 2), difference), torch.zeros(2, 2))
    assert error.value == expected


@pytest.mark.parametrize(("found", "lines", "last"), [(0, 0, None), (20, 20, "19"), (21, 21, "and 1 more")])
def test_failures_are_cut_off_at_twenty(found: int, lines: int, last: str | None) -> None:
    check = conclude("files", "detail", map(str, range(found)))
    assert len(check.failures) == lines
    assert check.status == ("failed" if found else "passed")
    assert last is None or check.failures[-1] == last
