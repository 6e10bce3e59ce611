"""The FP8 KV cache of llm-compressor and Model-Optimizer on the same model and the same tokens, beside ours.

Runs in their environments (`make test-slow` builds them).
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fourge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
KV_KEYS = ("num_bits", "type", "symmetric", "strategy", "dynamic")


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


def kv_scales(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in read(directory).items() if name.endswith((".k_scale", ".v_scale"))}


def quantization_config(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content["quantization_config"]


@pytest.fixture
def peer(pico: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`peer(environment, script, dtype)`: our checkpoint and theirs."""

    def run(environment: str, script: str, dtype: torch.dtype) -> tuple[Path, Path]:
        python = ROOT / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"{environment} is not there: `make test-slow` builds it")
        model, ours, theirs = pico(dtype=dtype), tmp_path / "ours", tmp_path / "theirs"
        samples: Any = {"num_calibration_samples": 6, "num_probe_samples": 1, "max_seq_length": 24}
        fourge.quantize(
            str(model),
            ours,
            method="max",
            kv_cache_scheme="fp8",
            calibration="random",
            input_headroom=1.0,
            threads=1,
            **samples,
        )
        tokens = ours / ".fourge" / "tokens.safetensors"
        command = [python, PEERS / script, model, theirs, tokens, "--recipe", "kv-fp8", "--threads", "1"]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return ours, theirs

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llm_compressor(dtype: torch.dtype, peer: Callable[..., tuple[Path, Path]]) -> None:
    """The same names and shapes. They store the scales in the model's dtype, we in FP32, as engines hold them."""
    ours, theirs = peer(".venv-llmcompressor", "llmcompressor_oneshot.py", dtype)
    assert {n: t.shape for n, t in read(ours).items()} == {n: t.shape for n, t in read(theirs).items()}
    ours_scales, their_scales = kv_scales(ours), kv_scales(theirs)
    assert len(ours_scales) == 4 and {t.dtype for t in ours_scales.values()} == {torch.float32}
    assert {t.dtype for t in their_scales.values()} == {dtype}
    for name, scale in ours_scales.items():
        # FP32 rounding; with a BF16 model their keys, values and quotient are BF16, and ours are of FP32 arithmetic.
        rtol = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(scale, their_scales[name].float(), rtol=rtol, atol=0)
    ours_scheme, their_scheme = (quantization_config(directory)["kv_cache_scheme"] for directory in (ours, theirs))
    assert ours_scheme == {key: their_scheme[key] for key in KV_KEYS}


def test_their_checkpoint_verifies(peer: Callable[..., tuple[Path, Path]]) -> None:
    _, theirs = peer(".venv-llmcompressor", "llmcompressor_oneshot.py", torch.bfloat16)
    assert fourge.verify(theirs, threads=1).passed


def test_model_optimizer(peer: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Ours converted has the names, dtypes and shapes of their export, and says the same of the cache."""
    ours, theirs = peer(".venv-modelopt", "modelopt_export.py", torch.bfloat16)
    fourge.convert(str(ours), tmp_path / "converted", layout="modelopt")
    found, expected = (
        {name: (tensor.dtype, tensor.shape) for name, tensor in read(directory).items()}
        for directory in (tmp_path / "converted", theirs)
    )
    assert found == expected and len(kv_scales(theirs)) == 4
    for name, scale in kv_scales(theirs).items():
        # Their BF16 model's keys and values beside those of our FP32 arithmetic.
        torch.testing.assert_close(kv_scales(tmp_path / "converted")[name], scale, rtol=0.02, atol=0)
    stored = [json.loads((d / "hf_quant_config.json").read_text()) for d in (tmp_path / "converted", theirs)]
    assert {content["quantization"]["kv_cache_quant_algo"] for content in stored} == {"FP8"}
    found_scheme, expected_scheme = (
        quantization_config(directory)["kv_cache_scheme"] for directory in (tmp_path / "converted", theirs)
    )
    assert found_scheme == expected_scheme
    there, back = tmp_path / "there", tmp_path / "back"
    fourge.convert(str(theirs), there, layout="compressed-tensors")
    assert fourge.verify(there, threads=1).passed
    fourge.convert(str(there), back, layout="modelopt")
    for path in theirs.iterdir():
        assert path.read_bytes() == (back / path.name).read_bytes(), path.name
