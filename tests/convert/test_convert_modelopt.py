"""Model-Optimizer's own export of the same model on the same calibration tokens, beside ours converted.

Runs in Model-Optimizer's environment (`make test-slow` builds it).
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from both_layouts import contents, read

import fourge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".venv-modelopt" / "bin" / "python"
VARIANTS = [("NVFP4", False), ("NVFP4", True), ("NVFP4A16", False)]


@dataclass(frozen=True)
class Pair:
    """Both tools' checkpoints of one source, in NVIDIA's layout."""

    source: Path
    ours: Path
    theirs: Path

    def json(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        ours, theirs = (json.loads((directory / name).read_text()) for directory in (self.ours, self.theirs))
        return ours, theirs


@pytest.fixture(scope="module")
def pair(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Pair]:
    if not PEER_PYTHON.exists():
        pytest.skip(f"{PEER_PYTHON.relative_to(ROOT)} is not there: `make test-slow` builds it")
    done: dict[tuple[str, bool], Pair] = {}

    def get(scheme: str, tied: bool) -> Pair:
        if (scheme, tied) in done:
            return done[scheme, tied]
        folder, model = tmp_path_factory.mktemp("pair"), pico(tie_word_embeddings=tied)
        fourge.quantize(
            str(model),
            folder / "quantized",
            scheme=scheme,  # type: ignore[arg-type]
            method="max",
            calibration="random",
            num_calibration_samples=6,
            num_probe_samples=1,
            max_seq_length=24,
            input_headroom=1.0,
            compute_dtype="bfloat16",
            threads=1,
        )
        fourge.convert(str(folder / "quantized"), folder / "ours", layout="modelopt")
        script = ROOT / "benchmarks" / "peers" / "modelopt_export.py"
        tokens = folder / "quantized" / ".fourge" / "tokens.safetensors"
        command = [PEER_PYTHON, script, model, folder / "theirs", tokens, "--scheme", scheme, "--threads", "1"]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        done[scheme, tied] = Pair(model, folder / "ours", folder / "theirs")
        return done[scheme, tied]

    return get


@pytest.mark.parametrize(("scheme", "tied"), VARIANTS)
def test_same_names_dtypes_shapes(pair: Callable[..., Pair], scheme: str, tied: bool) -> None:
    both = pair(scheme, tied)
    ours, theirs = (
        {name: (tensor.dtype, tensor.shape) for name, tensor in read(directory).items()}
        for directory in (both.ours, both.theirs)
    )
    assert ours == theirs


@pytest.mark.parametrize(("scheme", "tied"), VARIANTS)
def test_same_fields(pair: Callable[..., Pair], scheme: str, tied: bool) -> None:
    both = pair(scheme, tied)
    ours, theirs = both.json("hf_quant_config.json")
    assert ours == theirs
    ours, theirs = both.json("config.json")
    for config in (ours, theirs):
        del config["transformers_version"]
    assert ours == theirs


@pytest.mark.parametrize(("scheme", "tied"), VARIANTS)
def test_same_values(pair: Callable[..., Pair], scheme: str, tied: bool) -> None:
    """They compute `amax / 2688` where we compute `2688 / amax` and invert that: the last place may differ.

    Where it does, a group scale or a code on the edge between two values may go the other way.
    """
    both = pair(scheme, tied)
    ours, theirs = read(both.ours), read(both.theirs)
    packed = [name for name, tensor in theirs.items() if tensor.dtype == torch.uint8]
    scales = [name for name, tensor in theirs.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(packed) == len(scales) == 14
    for name, tensor in theirs.items():
        if name.endswith("weight_scale_2"):
            torch.testing.assert_close(ours[name], tensor, rtol=2**-23, atol=0)
        elif name.endswith("input_scale"):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=0)
        elif name not in packed + scales:
            assert torch.equal(ours[name], tensor), name
    for names, allowed in ((scales, 0.01), (packed, 0.005)):
        differing = sum(int((ours[n].view(torch.uint8) != theirs[n].view(torch.uint8)).sum()) for n in names)
        assert differing <= allowed * sum(theirs[n].numel() for n in names)


@pytest.mark.parametrize(("scheme", "tied"), VARIANTS)
def test_theirs_converts_and_comes_back(pair: Callable[..., Pair], scheme: str, tied: bool, tmp_path: Path) -> None:
    theirs = pair(scheme, tied).theirs
    result = fourge.convert(str(theirs), tmp_path / "there", layout="compressed-tensors")
    assert (result.source_layout, result.scheme, result.quantized_linears) == ("modelopt", scheme, 14)
    fourge.convert(str(tmp_path / "there"), tmp_path / "back", layout="modelopt")
    assert contents(tmp_path / "back") == contents(theirs)


@pytest.mark.parametrize(("scheme", "tied"), VARIANTS)
def test_theirs_converted_verifies(pair: Callable[..., Pair], scheme: str, tied: bool, tmp_path: Path) -> None:
    both = pair(scheme, tied)
    fourge.convert(str(both.theirs), tmp_path / "there", layout="compressed-tensors")
    assert fourge.verify(tmp_path / "there", threads=1).passed
    report = fourge.verify(tmp_path / "there", source=str(both.source), threads=1)
    # They leave the licence behind, and their release of transformers words JSON files in its own way.
    failed = {check.name: check.failures for check in report.checks if check.status == "failed"}
    assert failed.keys() <= {"sidecars", "source_config"}
    assert all("transformers_version" in failure for failure in failed.get("source_config", ()))
    passed = {check.name for check in report.checks if check.status == "passed"}
    assert {"tensors", "scales", "fused_groups", "unquantized", "dequantized"} <= passed
