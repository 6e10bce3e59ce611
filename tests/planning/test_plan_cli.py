"""`fourge plan` as scripts and people see it, what it refuses, and its ten-second probe, cut short here."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from written_configs import LLAMA_405B, write_config

from fourge.cli import app
from fourge.errors import InputError
from fourge.methods import find_method
from fourge.planning import probe, quantizing
from fourge.settings import QuantizeSettings


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--no-probe", "--device", "cpu"])
    return result.exit_code, result.stdout, result.stderr


def refusal(*arguments: str | Path) -> str:
    """The one line on standard error."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fourge: ") and err.count("\n") == 1
    return err


def test_json(tmp_path: Path) -> None:
    code, out, _ = run(write_config(tmp_path), "--gpu", "b200:2", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["sizes"]["output_bytes"] == 234_339_867_536
    assert report["kv_cache"] == {"bytes_per_token_bf16": 516096, "bytes_per_token_fp8": 258048}
    assert report["asked"]["holds"] is True
    assert [fit["gpu"] for fit in report["gpus"]][:3] == ["B200", "GB200", "GB300"]
    assert report["asked"]["kv_cache_tokens_fp8"] == 2 * report["asked"]["kv_cache_tokens"] or (
        report["asked"]["kv_cache_tokens_fp8"] == 2 * report["asked"]["kv_cache_tokens"] + 16
    )
    assert report["tensor_parallel_ranks"]["1"] == {"weights": 234_339_867_536, "replicated": 0}
    assert report["quantizing"]["seconds"] is None
    assert {kernel["name"] for kernel in report["kernels"]} == {"FP4 tensor cores", "Marlin", "emulation"}


def test_a_model_that_fits_nowhere(tmp_path: Path) -> None:
    code, out, _ = run(write_config(tmp_path), "--gpu-memory", "6GiB", "--sm", "12.0")
    assert code == 0
    assert "64 × SM120 of 6 GiB (6.4 GB = 6.0 GiB each): does not: weights of 3.7 GiB" in out


def test_memory_is_said_to_be_beside_the_packages(tmp_path: Path) -> None:
    code, out, _ = run(write_config(tmp_path))
    (line,) = (line for line in out.splitlines() if line.lstrip().startswith("host memory"))
    assert code == 0 and line.endswith("; Python's packages come on top (600 MB, more with CUDA)")


def test_a_context_that_fits_nowhere(tmp_path: Path) -> None:
    """Eight key-value heads spread over eight GPUs and no more."""
    code, out, _ = run(write_config(tmp_path), "--gpu", "l40s", "--concurrency", "64")
    assert code == 0
    assert "64 × L40S (48.3 GB = 45.0 GiB each): does not: the KV cache holds" in out
    assert "lower --max-model-len or --concurrency" in out


@pytest.mark.parametrize("field", sorted(LLAMA_405B.keys() - {"torch_dtype", "tie_word_embeddings"}))
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, **{field: None})
    assert f"{path}: lacks {field};" in refusal(path)


def test_all_missing_fields_are_named(tmp_path: Path) -> None:
    path = write_config(tmp_path, hidden_size=None, vocab_size=None)
    assert "lacks hidden_size, vocab_size;" in refusal(path)


@pytest.mark.parametrize("value", ["16384", 0, -1, 1.5, True])
def test_a_field_of_the_wrong_kind_is_named(value: Any, tmp_path: Path) -> None:
    assert "hidden_size is" in refusal(write_config(tmp_path, hidden_size=value))


def test_headers_show_that_every_head_has_its_own_key_and_value(pico: Callable[..., Path], tmp_path: Path) -> None:
    """A first Llama's config has no num_key_value_heads; with the shards beside it, that is no omission."""
    model = tmp_path / "model"
    shutil.copytree(pico("llama", num_key_value_heads=4), model)
    config = json.loads((model / "config.json").read_text())
    del config["num_key_value_heads"]
    (model / "config.json").write_text(json.dumps(config))
    code, out, _ = run(model)
    assert code == 0 and "4 heads, 4 key-value heads" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "b100"], "--gpu b100 is not known; known are: B200, GB200, GB300, RTX 5090, RTX PRO 6000, H200"),
        (["--gpu", "b200:2", "--tensor-parallel-size", "4"], "disagree"),
        (["--tensor-parallel-size", "4"], "of which GPU?"),
        (["--gpu-memory", "96GiB"], "give both"),
        (["--max-model-len", "131073"], "max_position_embeddings is 131072"),
        (["--ignore", "nothing"], "--ignore nothing matches no Linear"),
        (["--revision", "main"], "is local and has none"),
        (["--method", "awq"], "--method awq is not known; known are: max, search, gptq, replay"),
        (["--scheme", "NVFP4A16", "--method", "gptq"], "--method gptq needs data"),
        (["--calibration", "none"], "NVFP4 needs data for its input scales"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in refusal(write_config(tmp_path, num_hidden_layers=2), *arguments)


def test_models_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no config.json" in refusal(tmp_path)
    assert "dtype 'int8' is not one of" in refusal(write_config(tmp_path, torch_dtype="int8"))
    assert "architecture GPT2LMHeadModel is not known" in refusal(
        write_config(tmp_path, architectures=["GPT2LMHeadModel"])
    )
    assert "quantized, but not as NVFP4" in refusal(write_config(tmp_path, quantization_config={"quant_method": "fp8"}))
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path / "config.json")
    assert "not a hub id" in refusal("no/such/directory")


def test_a_hub_model_costs_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = write_config(tmp_path, num_hidden_layers=2)
    asked: list[tuple[Any, ...]] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    code, out, _ = run("someone/some-model", "--revision", "v1")
    assert code == 0 and "2 layers" in out
    assert asked == [("someone/some-model", "config.json", {"revision": "v1"})]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*arguments: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "the hub gives no config.json (offline)" in refusal("someone/some-model")


def test_a_config_without_a_dtype_is_taken_for_bf16(tmp_path: Path) -> None:
    code, out, _ = run(write_config(tmp_path, torch_dtype=None, num_hidden_layers=2))
    assert code == 0 and "note: config.json names no dtype: BF16 is taken" in out


# The probe


@pytest.fixture
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(probe, "_COLUMNS", {"cpu": 64})
    monkeypatch.setattr(probe, "_TOKENS", 32)


def rates_of(folder: Path, seconds: float = 0.05, **changes: Any) -> probe.Rates:
    settings = QuantizeSettings(
        **{"model": "m", "revision": None, "scheme": "NVFP4", "kv_cache_scheme": None, "method": "max"},
        **{
            "smooth": False,
            "recipe_file": None,
            "targets": (),
            "ignore": (),
            "calibration": "text",
            "probe": None,
            "seed": 0,
        },
        **{"num_calibration_samples": 1, "num_validation_samples": 1, "num_probe_samples": 1, "max_seq_length": 16},
        **{"input_headroom": 2.0, "micro_batch_tokens": 32, "threads": 1},
        **{"compute_dtype": "float32", "device": "cpu", "backend": "torch"},
    )
    settings = replace(settings, **changes)
    return probe.measure_rates(folder, None, settings, find_method(settings.method), seconds)


@pytest.mark.usefixtures("short_probe")
def test_rates_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    rates = vars(rates_of(tmp_path))
    assert {name for name, value in rates.items() if value is None} == {"smooth", "curvature"}
    assert all(value > 0 for value in rates.values() if value is not None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_probe")
def test_what_a_recipe_adds_is_measured(tmp_path: Path) -> None:
    rates = rates_of(tmp_path, method="gptq", smooth=True)
    assert all(value > 0 for value in vars(rates).values())
    weight_only = rates_of(tmp_path, method="search", scheme="NVFP4A16", calibration="none")
    assert weight_only.smooth is None and weight_only.curvature is None


@pytest.mark.usefixtures("short_probe")
def test_times_follow_from_rates(pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fourge

    monkeypatch.setattr(quantizing, "PROBE_SECONDS", 0.05)
    cost = fourge.plan(str(pico("llama")), output=tmp_path, device="cpu").quantizing
    assert cost is not None and cost.rates is not None and cost.seconds is not None
    parts = cost.seconds
    single = (parts.computing, parts.smoothing, parts.quantizing)
    assert all(single) and parts.total == pytest.approx(sum(single) + max(parts.reading, parts.writing))
    assert parts.reading == pytest.approx(cost.work.bytes_read / cost.rates.disk_read)
    assert parts.writing == pytest.approx(cost.work.bytes_written / cost.rates.disk_write)
    on_gpu = quantizing._estimate_seconds(cost.work, cost.rates, has_data=True, on_gpu=True)
    assert on_gpu.total == pytest.approx(max(sum(single), parts.reading + parts.writing))
    without = fourge.plan(str(pico("llama")), output=tmp_path, device="cpu", scheme="NVFP4A16", calibration="none")
    assert without.quantizing is not None and without.quantizing.seconds is not None
    parts = without.quantizing.seconds
    assert parts.total == max(parts.reading, parts.quantizing, parts.writing) > 0


@pytest.mark.usefixtures("short_probe")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probe, "write_safetensors", full)
    with pytest.raises(InputError, match=r"No space left on device, so its disk cannot be measured; name another -o"):
        rates_of(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_rates_of_a_gpu(tmp_path: Path) -> None:
    rates = rates_of(tmp_path, seconds=1, method="gptq", smooth=True, device="cuda", compute_dtype="bfloat16")
    assert rates.linear_bf16 > 1e12 and rates.curvature
