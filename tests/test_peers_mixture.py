"""A mixture of NVFP4 and FP8 by llm-compressor, beside ours of the same model and calibration tokens."""

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
PEER_PYTHON = ROOT / ".venv-llmcompressor" / "bin" / "python"
RECIPE = {"rules": [{"targets": "re:.*down_proj", "scheme": "FP8"}]}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(
    request: pytest.FixtureRequest, pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Source, our output, theirs."""
    if not PEER_PYTHON.exists():
        pytest.skip(f"{PEER_PYTHON.relative_to(ROOT)} is not there: `make test-slow` builds it")
    folder, model = tmp_path_factory.mktemp("mixture"), pico(dtype=request.param)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    fourge.quantize(
        str(model),
        folder / "ours",
        recipe_file=folder / "recipe.json",
        method="max",
        calibration="random",
        num_calibration_samples=6,
        num_probe_samples=1,
        max_seq_length=24,
        input_headroom=1.0,
        compute_dtype="float32",
    )
    script = ROOT / "benchmarks" / "peers" / "llmcompressor_oneshot.py"
    tokens = folder / "ours" / ".fourge" / "tokens.safetensors"
    command = [PEER_PYTHON, script, model, folder / "theirs", tokens, "--recipe", "mixture", "--threads", "1"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return model, folder / "ours", folder / "theirs"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


def groups(directory: Path) -> dict[str, Any]:
    """The groups of a config by format, as compressed-tensors reads them, but for targets and observers."""
    from compressed_tensors.quantization import QuantizationConfig

    stored = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "mixed-precision"
    found = {}
    for group in QuantizationConfig.model_validate(stored).model_dump()["config_groups"].values():
        del group["targets"]
        for part in ("weights", "input_activations"):
            group[part].pop("observer", None)
        found[group["format"]] = group
    return found


def test_same_tensors(pair: tuple[Path, Path, Path]) -> None:
    """Names, dtypes and shapes; on an FP32 model the bytes of every weight, on a BF16 one the scales of FP8.

    Theirs divides BF16 weights in BF16: a quotient is rounded twice, and now and then ends on the neighbour.
    """
    source, ours, theirs = map(tensors, pair)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    in_fp32 = source["model.norm.weight"].dtype == torch.float32
    for name, tensor in theirs.items():
        if name.endswith("down_proj.weight"):
            differing = (ours[name].view(torch.uint8).int() - tensor.view(torch.uint8).int()).abs()
            assert int(differing.max()) <= (0 if in_fp32 else 1)
            assert float(differing.float().mean()) < 0.05
        elif name.endswith("down_proj.weight_scale") or (in_fp32 and not name.endswith("input_global_scale")):
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_same_groups(pair: tuple[Path, Path, Path]) -> None:
    _, ours, theirs = pair
    assert groups(ours) == groups(theirs) and groups(ours).keys() == {"nvfp4-pack-quantized", "float-quantized"}


def test_theirs_verifies(pair: tuple[Path, Path, Path]) -> None:
    """All that can be held against the source: files of another tool carry no record, and are not our sidecars."""
    source, _, theirs = pair
    report = fourge.verify(theirs, source=str(source), deep=True, probe="random", num_probe_samples=2, threads=1)
    checks = {check.name: check for check in report.checks}
    for name in ("files", "config", "tensors", "scales", "fused_groups", "unquantized", "dequantized", "deep"):
        assert checks[name].status == "passed", checks[name].failures
    assert "NVFP4" in checks["config"].detail and "FP8" in checks["config"].detail
