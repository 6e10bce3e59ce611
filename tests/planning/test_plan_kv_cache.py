"""A plan of a checkpoint that says its KV cache is FP8."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_plan_bytes import quantize, tensor_bytes
from written_configs import plan, write_config

from fourge.checkpoint.compressed_tensors import quantization_config


@pytest.fixture
def with_cache(pico: Callable[..., Path], tmp_path: Path) -> Path:
    return quantize(pico(), tmp_path / "out", kv_cache_scheme="fp8")


def test_the_planned_tensors_are_those_written(with_cache: Path, tmp_path: Path) -> None:
    """From the headers, and from the config alone, which has to know of the two scales a layer."""
    config = tmp_path / "config.json"
    config.write_text((with_cache / "config.json").read_text())
    for report in (plan(with_cache), plan(config)):
        assert report.sizes.output_bytes == tensor_bytes(with_cache)
        parts = {part.name: part.output_bytes for part in report.sizes.parts}
        assert sum(parts.values()) == report.sizes.output_bytes
    without = json.loads(config.read_text())
    without["quantization_config"]["kv_cache_scheme"] = None
    config.write_text(json.dumps(without))
    fewer = {part.name: part.output_bytes for part in plan(config).sizes.parts}
    assert {name: parts[name] - fewer[name] for name in parts if parts[name] != fewer[name]} == {"attention": 2 * 2 * 4}


def test_a_source_that_will_have_scales(with_cache: Path, pico: Callable[..., Path]) -> None:
    """Planned before anything is written: the bytes, and the cache that `auto` will then mean."""
    report = plan(pico(), kv_cache_scheme="fp8")
    assert report.sizes.output_bytes == tensor_bytes(with_cache)
    assert report.sizes.shard_bytes == sum(path.stat().st_size for path in with_cache.glob("*.safetensors"))
    assert report.quantizing is not None and report.quantizing.disk_output == report.sizes.shard_bytes
    assert report.request.kv_cache_dtype == "fp8"


@pytest.mark.parametrize(("asked", "bytes_per_value"), [(None, 1), ("auto", 1), ("fp8", 1), ("bfloat16", 2)])
def test_the_cache_is_counted_as_the_engine_will_keep_it(
    asked: str | None, bytes_per_value: int, tmp_path: Path
) -> None:
    """405B: 126 layers, 8 KV heads of 128, keys and values; `auto` follows the checkpoint, a choice stands."""
    config = write_config(tmp_path, quantization_config=quantization_config("NVFP4", ["lm_head"], "fp8"))
    options = {} if asked is None else {"kv_cache_dtype": asked}
    fit = plan(config, gpu="b200:2", concurrency=1, max_model_len=65536, **options).asked
    assert fit is not None
    token = 2 * 126 * 8 * 128 * bytes_per_value // 2  # half on each of two ranks
    assert fit.kv_cache_tokens == fit.kv_cache // (16 * token) * 16


def test_a_source_has_two_bytes_unless_told(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    tokens = {}
    for dtype in ("auto", "bfloat16", "fp8"):
        fit = plan(config, gpu="b200:2", max_model_len=65536, kv_cache_dtype=dtype).asked
        assert fit is not None
        tokens[dtype] = fit.kv_cache_tokens
    assert tokens["auto"] == tokens["bfloat16"] and tokens["fp8"] // 16 in (
        tokens["auto"] // 8,
        tokens["auto"] // 8 + 1,
    )


def test_every_other_scheme_of_the_cache_is_refused(tmp_path: Path) -> None:
    from fourge.errors import InputError

    stored = quantization_config("NVFP4", ["lm_head"], "fp8")
    stored["kv_cache_scheme"]["num_bits"] = 4
    with pytest.raises(InputError, match=r"kv_cache_scheme\.num_bits is 4"):
        plan(write_config(tmp_path, quantization_config=stored))
