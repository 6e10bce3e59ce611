"""The table of GPUs, the kernels they get, the options that name them, and the roofline worked out by hand."""

from pathlib import Path

import pytest
from written_configs import plan, write_config

from fourge.errors import InputError
from fourge.planning.hardware import GPUS, find_gpu, parse_bytes, parse_gpu
from fourge.planning.kernels import choose_kernel

SOLD_AS = {"B200": 180, "GB200": 186, "GB300": 279, "RTX 5090": 32, "RTX PRO 6000": 96}
SOLD_AS |= {"H200": 141, "H100": 80, "A100": 80, "L40S": 48, "MI300X": 192}
"""GB on the card; what the driver reports in GiB is at most that, and at least 93 % of it."""


def test_every_gpu_of_the_list_is_there() -> None:
    assert {gpu.name for gpu in GPUS} == set(SOLD_AS)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_figures_are_of_the_right_size(gpu) -> None:  # type: ignore[no-untyped-def]
    assert 0.93 <= gpu.memory / (SOLD_AS[gpu.name] << 30) <= 1
    assert gpu.bandwidth is not None and gpu.bf16 is not None
    assert 0.5e12 < gpu.bandwidth <= 8e12
    assert 1e14 < gpu.bf16 <= 2.5e15
    if gpu.fp8 is not None:
        assert gpu.fp8 / gpu.bf16 == pytest.approx(4 if gpu.name == "RTX 5090" else 2, rel=0.02)
    assert (gpu.fp4 is not None) == (gpu.sm in (100, 103, 120))
    if gpu.fp4 is not None and gpu.fp8 is not None:
        assert gpu.fp4 / gpu.fp8 == pytest.approx(3 if gpu.name == "GB300" else 2, rel=0.02)


@pytest.mark.parametrize("name", ["rtx pro 6000", "RTX-PRO-6000", "NVIDIA RTX PRO 6000", "rtxpro6000"])
def test_names_are_read_as_people_write_them(name: str) -> None:
    assert find_gpu(name).name == "RTX PRO 6000"


@pytest.mark.parametrize(
    ("gpu_memory", "sm", "scheme", "kernel"),
    [
        ("96GiB", "10.0", "NVFP4", "FP4 tensor cores"),
        ("96GiB", "10.3", "NVFP4", "FP4 tensor cores"),
        ("96GiB", "12.0", "NVFP4", "FP4 tensor cores"),
        ("96GiB", "12.1", "NVFP4", "FP4 tensor cores"),
        ("96GiB", "12.0", "NVFP4A16", "Marlin"),
        ("96GiB", "11.0", "NVFP4", "Marlin"),
        ("96GiB", "9.0", "NVFP4", "Marlin"),
        ("96GiB", "8.0", "NVFP4", "Marlin"),
        ("96GiB", "7.5", "NVFP4", "Marlin in FP16"),
        ("96GiB", "7.0", "NVFP4", None),
    ],
)
def test_kernel_by_capability(gpu_memory: str, sm: str, scheme, kernel: str | None) -> None:  # type: ignore[no-untyped-def]
    parsed = parse_gpu(None, gpu_memory, sm)
    assert parsed is not None
    chosen = choose_kernel(parsed[0], scheme)
    assert (chosen and chosen.name) == kernel


def test_a_gpu_without_cuda_is_emulated() -> None:
    chosen = choose_kernel(find_gpu("mi300x"), "NVFP4")
    assert chosen is not None and chosen.name == "emulation" and chosen.activations_quantized


def test_only_w4a4_kernels_round_activations() -> None:
    for gpu in GPUS:
        kernel = choose_kernel(gpu, "NVFP4")
        assert kernel is not None
        assert kernel.activations_quantized == ("W4A4" in kernel.accuracy.partition(",")[0])


def test_memory_and_sm_override_those_of_a_name() -> None:
    parsed = parse_gpu("h100:2", "94GB", None)
    assert parsed is not None
    gpu, count = parsed
    assert (gpu.memory, gpu.sm, gpu.bf16, count) == (94 * 10**9, 90, find_gpu("h100").bf16, 2)


@pytest.mark.parametrize(
    ("text", "count"), [("96GiB", 96 << 30), ("80 GB", 80 * 10**9), ("81559MiB", 81559 << 20), ("0.5tib", 1 << 39)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes("--gpu-memory", text) == count


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("b100", None, None), "known are: B200, GB200, GB300, RTX 5090"),
        (("b200:0", None, None), "not a number of GPUs"),
        (("b200:", None, None), "nothing after the colon"),
        (("b200:two", None, None), "two after the colon"),
        ((None, "96GiB", None), "give both"),
        ((None, None, "12.0"), "give both"),
        ((None, "96", "12.0"), "--gpu-memory 96 is not a size"),
        ((None, "0GiB", "12.0"), "not a size"),
        ((None, "96GiB", "120"), "--sm 120 is not a compute capability"),
    ],
)
def test_what_names_no_gpu(options: tuple[str | None, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_gpu(*options)


def test_roofline_by_hand(tmp_path: Path) -> None:
    """405B on two B200: memory bounds decode, FP4 arithmetic prefill."""
    asked = plan(write_config(tmp_path), gpu="b200:2", max_model_len=8192, concurrency=4).asked
    assert asked is not None and asked.roofline is not None
    embedding = 128256 * 16384 * 2 / 2
    weights = asked.weights - embedding
    cache = 4 * 8192 * 516_096 / 2
    assert asked.roofline.decode_alone == pytest.approx(7.7e12 / weights, rel=1e-4)
    assert asked.roofline.decode == pytest.approx(4 * 7.7e12 / (weights + cache), rel=1e-4)
    assert asked.roofline.decode_bound_by == "memory bandwidth"
    attention = 4 * 126 * 128 * 128 * 8192 / 2
    seconds = (2 * 401.65e9 / 9e15 + attention / 2.25e15) / 2
    assert asked.roofline.prefill == pytest.approx(1 / seconds, rel=1e-3)


def test_what_is_in_fp8_is_multiplied_in_fp8(tmp_path: Path) -> None:
    """`down_proj` of a 405B: 126 of 16384 × 53248. It is twice the bytes to read, and half as fast to multiply."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{targets: 're:.*down_proj', scheme: FP8}]\n")
    asked = plan(write_config(tmp_path), gpu="b200:4", max_model_len=8192, recipe_file=recipe).asked
    assert asked is not None and asked.roofline is not None
    fp8 = 126 * 16384 * 53248
    expected = (401.65e9 - fp8) * 0.5625 + fp8 + 126 * 16384 * 2 + 8.41e9
    assert 4 * asked.weights == pytest.approx(expected, rel=1e-3)
    attention = 4 * 126 * 128 * 128 * 8192 / 2
    seconds = (2 * ((401.65e9 - fp8) / 9e15 + fp8 / 4.5e15) + attention / 2.25e15) / 4
    assert asked.roofline.prefill == pytest.approx(1 / seconds, rel=1e-3)


def test_many_short_sequences_are_bound_by_arithmetic(tmp_path: Path) -> None:
    asked = plan(write_config(tmp_path), gpu="a100:16", max_model_len=256, concurrency=1024).asked
    assert asked is not None and asked.roofline is not None
    assert asked.roofline.decode_bound_by == "arithmetic"
    assert asked.roofline.decode < 16 * 312e12 / (2 * 401.65e9)


def test_a_gpu_by_memory_alone_has_no_roofline(tmp_path: Path) -> None:
    asked = plan(write_config(tmp_path), gpu_memory="192GiB", sm="12.0", tensor_parallel_size=4).asked
    assert asked is not None and asked.holds and asked.count == 4
    assert asked.roofline is None


def test_key_value_heads_fewer_than_ranks_are_replicated(tmp_path: Path) -> None:
    """Beyond 8 ranks another GPU no longer makes the cache of a token smaller."""
    config = write_config(tmp_path)
    eight, sixteen = (plan(config, gpu=f"h100:{count}").asked for count in (8, 16))
    assert eight is not None and sixteen is not None
    per_token = [fit.kv_cache / fit.kv_cache_tokens for fit in (eight, sixteen)]
    assert per_token == pytest.approx([516_096 / 8] * 2, rel=1e-3)
    key_and_value = 126 * 2 * (1024 * 16384 * 9 // 16) // 8
    assert sixteen.replicated - eight.replicated == key_and_value
