"""What is right passes every check: ours in all schemes and shapes, and what compressed-tensors itself wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourge
from fourge import InputError, VerifyReport

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}


def statuses(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def detail(report: VerifyReport, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_passes(name: str, scheme: str, quantized: Callable) -> None:
    architecture, changes = MODELS[name]
    source, output = quantized(architecture, scheme, **changes)
    report = fourge.verify(output, source=str(source), deep=True, threads=1)
    assert report.passed
    assert set(statuses(report).values()) == {"passed"}
    assert all(not check.failures for check in report.checks)
    assert scheme in detail(report, "config")


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_the_walk_repeats_what_the_job_measured(scheme: str, quantized: Callable) -> None:
    """From the finished files, to the last bit: same tokens, same machine, same number of threads."""
    source, output = quantized("llama", scheme)
    job = json.loads((output / ".fourge" / "job.json").read_text())
    report = fourge.verify(output, source=str(source), deep=True, threads=1)
    assert report.fidelity == job["result"]["fidelity"]
    recorded = [step["measures"]["hidden_error"] for step in job["steps"][1:-1]]
    assert report.hidden_errors == [{"layer": i} | error for i, error in enumerate(recorded)]


def test_without_a_source_the_rest_is_checked(quantized: Callable) -> None:
    _, output = quantized()
    report = fourge.verify(output, threads=1)
    assert report.passed and report.fidelity is None
    assert [name for name, status in statuses(report).items() if status == "skipped"] == [
        *("sidecars", "source_config", "unquantized", "dequantized", "deep")
    ]


def test_verifying_changes_nothing(copy: Callable) -> None:
    untouched = copy()

    def state() -> dict[str, tuple[bytes, int]]:
        files = [path for path in untouched.directory.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state()
    untouched.verify(source=str(untouched.source), deep=True)
    assert state() == before


def test_other_tokens_are_walked_but_not_compared(quantized: Callable, tmp_path: Path) -> None:
    source, output = quantized()
    text = tmp_path / "probe.txt"
    text.write_text(" ".join(f"w{i}" for i in range(64)))
    report = fourge.verify(
        output, source=str(source), deep=True, probe=str(text), num_probe_samples=2, max_seq_length=16, threads=1
    )
    assert report.passed and report.fidelity is not None
    assert report.fidelity["kl_div"]["tokens"] == 2 * 15
    assert "recorded" in detail(fourge.verify(output, source=str(source), deep=True, threads=1), "deep")
    assert "recorded" not in detail(report, "deep")


def test_other_arithmetic_is_not_compared(quantized: Callable) -> None:
    source, output = quantized()
    report = fourge.verify(output, source=str(source), deep=True, compute_dtype="bfloat16", threads=1)
    assert report.passed
    assert "recorded" not in detail(report, "deep")


def test_a_tied_head_may_be_written_out(copy: Callable) -> None:
    """Other tools store it; it must then be the embedding."""
    tied = copy("llama", tie_word_embeddings=True)
    tied.forget_job()
    embedding = load_file(tied.shard_of("model.embed_tokens.weight"))["model.embed_tokens.weight"]
    shard = tied.shard_of("model.norm.weight")
    for head, expected in ((embedding, "passed"), (embedding * 2, "failed")):
        save_file(load_file(shard) | {"lm_head.weight": head.contiguous()}, shard, metadata={"format": "pt"})
        tied.edit_json("model.safetensors.index.json", lambda i: i["weight_map"].update({"lm_head.weight": shard.name}))
        report = tied.verify(source=str(tied.source))
        assert statuses(report)["tensors"] == "passed"
        assert statuses(report)["unquantized"] == expected


def test_kept_linears(pico: Callable[..., Path], tmp_path: Path) -> None:
    """A layer's MLP left out: its tensors are then compared with the source's, and walked as they are."""
    source = pico()
    output = tmp_path / "out"
    fourge.quantize(
        str(source),
        output,
        ignore=["lm_head", "re:.*layers.0.mlp.*"],
        calibration="random",
        num_calibration_samples=2,
        num_probe_samples=2,
        max_seq_length=16,
        threads=1,
    )
    report = fourge.verify(output, source=str(source), deep=True, threads=1)
    assert report.passed
    assert detail(report, "tensors").startswith("11 quantized Linears, 10 other tensors")


def write_with_compressed_tensors(source: Path, output: Path, scheme: str) -> None:
    """The source in `scheme`, quantized, packed and saved by compressed-tensors and transformers alone."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    packing = "nvfp4-pack-quantized"
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head", "re:.*vision.*"], quantization_status="frozen", format=packing
    )
    apply_quantization_config(model, config)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for fused in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ):
            low = torch.stack([linear.weight.min() for linear in fused]).min().reshape(1)
            high = torch.stack([linear.weight.max() for linear in fused]).max().reshape(1)
            for linear in fused:
                linear.weight_global_scale.data = generate_gparam(low, high)
                values = linear.weight.float().unflatten(-1, (-1, 16))
                linear.weight_scale.data, _ = calculate_qparams(
                    values.amin(-1), values.amax(-1), groups["group_0"].weights, linear.weight_global_scale
                )
                if scheme == "NVFP4":
                    linear.input_global_scale.data = torch.tensor([200.0])
    compressor = ModelCompressor.from_pretrained_model(model, packing)
    compressor.compress_model(model)
    model.save_pretrained(output)
    compressor.update_config(output)
    for path in source.iterdir():
        if path.suffix in (".jinja", "") or "token" in path.name:
            shutil.copy(path, output)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_a_checkpoint_that_compressed_tensors_wrote(scheme: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    source, output = pico(), tmp_path / "theirs"
    write_with_compressed_tensors(source, output, scheme)
    assert (output / "model.safetensors").exists(), "one file, no index"
    report = fourge.verify(output, source=str(source), deep=True, probe="random", max_seq_length=16, threads=1)
    assert report.passed
    assert [name for name, status in statuses(report).items() if status == "skipped"] == ["digests", "provenance"]
    assert scheme in detail(report, "config")


# What cannot be verified at all


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        fourge.verify(tmp_path / "nothing")


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        fourge.verify(tmp_path)


def test_a_checkpoint_that_is_not_quantized(pico: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="quantization_config"):
        fourge.verify(pico())


def test_deep_without_a_source(quantized: Callable) -> None:
    with pytest.raises(InputError, match="--source"):
        fourge.verify(quantized()[1], deep=True)


def test_deep_without_tokens(copy: Callable) -> None:
    bare = copy()
    bare.forget_job()
    with pytest.raises(InputError, match="--probe"):
        bare.verify(source=str(bare.source), deep=True)


def test_a_quantized_source(quantized: Callable) -> None:
    _, output = quantized()
    with pytest.raises(InputError, match="already quantized"):
        fourge.verify(output, source=str(output))


def test_an_unknown_architecture(copy: Callable) -> None:
    unknown = copy()
    unknown.edit_json("config.json", lambda c: c.update(architectures=["MambaForCausalLM"]))
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        unknown.verify()
