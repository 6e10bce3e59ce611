"""The figures of Llama-3.1-405B's shape, worked out here by hand from the published facts."""

from pathlib import Path

import pytest
from written_configs import describe, plan, write_config

from fourge.planning.fit import Request, fit, smallest_fit, smallest_of
from fourge.planning.hardware import GPUS, Gpu
from fourge.report.plan_text import plan_summary

HIDDEN, MIDDLE, LAYERS, VOCABULARY, KEYS = 16384, 53248, 126, 128256, 8 * 128
LINEARS_A_LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * MIDDLE
ENDS = 2 * VOCABULARY * HIDDEN
NORMS = (2 * LAYERS + 1) * HIDDEN
GIB = 1 << 30


def test_sizes(tmp_path: Path) -> None:
    sizes = plan(write_config(tmp_path)).sizes
    assert sizes.parameters == LAYERS * LINEARS_A_LAYER + ENDS + NORMS
    assert sizes.parameters / 1e9 == pytest.approx(405.85, abs=0.005)
    assert sizes.quantized_parameters / 1e9 == pytest.approx(401.65, abs=0.005)
    assert sizes.source_bytes == 2 * sizes.parameters
    assert sizes.source_bytes / 1e9 == pytest.approx(811.7, abs=0.05)
    assert sizes.source_layer_bytes == 2 * (LINEARS_A_LAYER + 2 * HIDDEN)
    assert sizes.source_layer_bytes / 1e9 == pytest.approx(6.375, abs=0.0005)


def test_output(tmp_path: Path) -> None:
    sizes = plan(write_config(tmp_path)).sizes
    global_scales = LAYERS * 7 * 2 * 4
    assert sizes.output_bytes == LAYERS * LINEARS_A_LAYER * 9 // 16 + 2 * (ENDS + NORMS) + global_scales
    assert sizes.output_bytes / 1e9 == pytest.approx(234.3, abs=0.05)
    assert sizes.output_bytes / GIB == pytest.approx(218.2, abs=0.05)
    assert sizes.num_shards == LAYERS + 2
    assert 0 < sizes.shard_bytes - sizes.output_bytes < 1_000_000, "headers"


def test_parts_are_the_whole(tmp_path: Path) -> None:
    sizes = plan(write_config(tmp_path)).sizes
    parts = {part.name: part for part in sizes.parts}
    assert list(parts) == ["embedding", "attention", "MLP", "norms", "head"]
    assert parts["MLP"].parameters == LAYERS * 3 * HIDDEN * MIDDLE
    assert parts["norms"].parameters == NORMS
    assert sum(part.parameters for part in sizes.parts) == sizes.parameters
    assert sum(part.source_bytes or 0 for part in sizes.parts) == sizes.source_bytes
    assert sum(part.output_bytes for part in sizes.parts) == sizes.output_bytes


def test_tensor_parallel_sizes(tmp_path: Path) -> None:
    report = plan(write_config(tmp_path))
    assert report.tensor_parallel_sizes == (1, 2, 4, 8, 16, 32, 64)
    assert report.tensor_parallel_obstacles == {}


def test_kv_cache(tmp_path: Path) -> None:
    cache = plan(write_config(tmp_path)).kv_cache
    assert cache.bytes_per_token_bf16 == 2 * LAYERS * KEYS * 2 == 516_096
    assert cache.bytes_per_token_fp8 == 258_048


def test_two_b200_hold_it_and_one_does_not(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    two = plan(config, gpu="b200:2", max_model_len=131072).asked
    assert two is not None and two.holds and two.count == 2
    assert two.budget == int(0.92 * 183_359 * (1 << 20))
    assert two.weights == pytest.approx(234.3e9 / 2, rel=1e-3)
    assert two.kv_cache == two.budget - two.weights - two.overhead
    assert two.full_length_sequences == two.kv_cache_tokens // 131072 == 1
    one = plan(config, gpu="b200:1").asked
    assert one is not None and not one.holds and "exceed" in (one.reason or "")


def test_a_request_takes_gpus(tmp_path: Path) -> None:
    """More sequences need more GPUs, and FP8 in the cache needs fewer."""
    config = write_config(tmp_path)
    requests = ({"concurrency": 1}, {"concurrency": 8, "kv_cache_dtype": "fp8"}, {"concurrency": 8})
    asked = [plan(config, gpu="b200", **options).asked for options in requests]
    assert [fit and (fit.count, fit.holds) for fit in asked] == [(2, True), (4, True), (8, True)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_smaller_number_holds_it(gpu: Gpu, tmp_path: Path) -> None:
    facts = describe(write_config(tmp_path, num_hidden_layers=12))
    request = Request(131072, 16, 0.92, "auto")
    found = smallest_fit(facts, gpu, request)
    assert found.holds
    for count in range(1, found.count):
        assert not fit(facts, gpu, count, request).holds


SMOLLM2_135M = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("shape", "native", "weight_only"), [({}, "2 × B200", "4 × A100"), (SMOLLM2_135M, "1 × RTX 5090", "1 × L40S")]
)
def test_what_is_suggested_is_small(shape: dict[str, int], native: str, weight_only: str, tmp_path: Path) -> None:
    fits = plan(write_config(tmp_path, **shape)).gpus
    suggested = [smallest_of(fits, native=True), smallest_of(fits, native=False)]
    assert [fit and f"{fit.count} × {fit.gpu}" for fit in suggested] == [native, weight_only]
    nowhere = plan(write_config(tmp_path, **shape), concurrency=10**9).gpus
    assert smallest_of(nowhere, native=True) is None and smallest_of(nowhere, native=False) is None


def test_a_small_model_is_measured_in_mib(tmp_path: Path) -> None:
    text = plan_summary(plan(write_config(tmp_path, **SMOLLM2_135M)))
    assert "0.0 GiB" not in text and "0.1 GiB" not in text and "MiB of weights a rank" in text


def test_quantizing(tmp_path: Path) -> None:
    """By `fast`, calibration runs in the source's lane and the probe in both; there is nothing to validate."""
    report = plan(write_config(tmp_path), recipe="fast", output=tmp_path / "not" / "there")
    cost = report.quantizing
    assert cost is not None
    assert (cost.method, cost.smooth) == ("search", False)
    assert (cost.tokens.calibration, cost.tokens.validation, cost.tokens.probe) == (512 * 2048, 0, 32 * 2048)
    rows = (512 + 2 * 32) * 2048
    assert cost.disk_hidden_states == 2 * rows * HIDDEN * 4
    assert cost.disk.needed == cost.disk_output + cost.disk_hidden_states
    assert cost.disk_output == report.sizes.shard_bytes
    assert 6.375e9 < cost.host_memory.needed < 20e9
    assert cost.device_memory is None
    assert cost.rates is None and cost.seconds is None


def test_hessians_of_53248_columns(tmp_path: Path) -> None:
    """One FP32 matrix of the widest input, and the calibration set in the quantized lane too."""
    cost = plan(write_config(tmp_path), method="gptq", smooth=True).quantizing
    assert cost is not None
    assert 4 * MIDDLE**2 < cost.host_memory.needed < 4 * MIDDLE**2 + 10e9
    assert cost.disk_hidden_states == 2 * (2 * 512 + 64 + 2 * 32) * 2048 * HIDDEN * 4
    squares = 3 * HIDDEN**2 + MIDDLE**2
    products = LAYERS * 512 * 2048 * squares
    factors = LAYERS * (3 * HIDDEN**3 + MIDDLE**3) // 3
    walks = LAYERS * (2 * HIDDEN + 2 * KEYS + 2 * MIDDLE) * HIDDEN**2 + LAYERS * HIDDEN * MIDDLE**2
    assert cost.work.flop_curvature == pytest.approx(products + factors + walks, rel=1e-9)


def test_the_text_says_both_units(tmp_path: Path) -> None:
    text = plan_summary(plan(write_config(tmp_path), gpu="b200:2"))
    for figure in ("405.85 G", "811.7 GB", "234.3 GB = 218.2 GiB", "6.375 GB a layer", "516,096", "upper bounds"):
        assert figure in text


@pytest.mark.shared
def test_the_published_config_is_the_same(tmp_path: Path, shared: Path) -> None:
    published = plan(shared / "data" / "llama3.1-405b-config.json")
    assert published.sizes == plan(write_config(tmp_path)).sizes
