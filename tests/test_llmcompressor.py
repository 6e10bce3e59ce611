"""llm-compressor's own output on the same model and the same calibration tokens, beside ours.

Runs in llm-compressor's environment (`make test-slow` builds it). Its weights and activations are BF16 where the
model is, and so are its intermediates; ours are FP32. On an FP32 model the files agree to the last byte; on a BF16
one every difference is the rounding that docs/numerics.md describes, and the tests below compute it.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fourge
from fourge.nvfp4 import quantize as nvfp4

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PEER_PYTHON = ROOT / ".venv-llmcompressor" / "bin" / "python"
FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
ALONE = (("self_attn.o_proj",), ("mlp.down_proj",))


@dataclass(frozen=True)
class Pair:
    """Both tools' tensors and configs for one source."""

    source: dict[str, torch.Tensor]
    ours: dict[str, torch.Tensor]
    theirs: dict[str, torch.Tensor]
    our_config: dict[str, Any]
    their_config: dict[str, Any]


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.fixture(scope="module")
def run(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Pair]:
    if not PEER_PYTHON.exists():
        pytest.skip(f"{PEER_PYTHON.relative_to(ROOT)} is not there: `make test-slow` builds it")
    done: dict[tuple[str, torch.dtype], Pair] = {}

    def both(scheme: str, dtype: torch.dtype) -> Pair:
        if (scheme, dtype) in done:
            return done[scheme, dtype]
        folder, model = tmp_path_factory.mktemp("pair"), pico(dtype=dtype)
        fourge.quantize(
            str(model),
            folder / "ours",
            scheme=scheme,  # type: ignore[arg-type]
            method="max",
            calibration="random",
            num_calibration_samples=6,
            num_probe_samples=1,
            max_seq_length=24,
            input_headroom=1.0,
            compute_dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        )
        script = ROOT / "benchmarks" / "peers" / "llmcompressor_oneshot.py"
        tokens = folder / "ours" / ".fourge" / "tokens.safetensors"
        command = [PEER_PYTHON, script, model, folder / "theirs", tokens, "--scheme", scheme, "--threads", "1"]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        configs = [json.loads((folder / tool / "config.json").read_text()) for tool in ("ours", "theirs")]
        done[scheme, dtype] = Pair(read(model), read(folder / "ours"), read(folder / "theirs"), *configs)
        return done[scheme, dtype]

    return both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_same_names_dtypes_shapes(run: Callable[..., Pair], scheme: str, dtype: torch.dtype) -> None:
    pair = run(scheme, dtype)
    assert {n: (t.dtype, t.shape) for n, t in pair.ours.items()} == {
        n: (t.dtype, t.shape) for n, t in pair.theirs.items()
    }
    for name in pair.source.keys() & pair.ours.keys():
        assert torch.equal(pair.ours[name], pair.theirs[name]), name


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_same_config(run: Callable[..., Pair], scheme: str) -> None:
    """compressed-tensors reads the same scheme out of both; the rest of config.json is the source's in both."""
    from compressed_tensors.quantization import QuantizationConfig

    pair = run(scheme, torch.bfloat16)
    ours, theirs = (
        QuantizationConfig.model_validate(config["quantization_config"]).model_dump()
        for config in (pair.our_config, pair.their_config)
    )
    for config in (ours, theirs):
        config.pop("version", None)
        # How the scales were found; a reader has no use for it.
        for arguments in ("weights", "input_activations"):
            if config["config_groups"]["group_0"][arguments]:
                config["config_groups"]["group_0"][arguments].pop("observer", None)
    assert ours == theirs
    assert pair.our_config["quantization_config"].keys() <= pair.their_config["quantization_config"].keys()


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_on_an_fp32_model_all_weight_bytes_agree(run: Callable[..., Pair], scheme: str) -> None:
    pair = run(scheme, torch.float32)
    for name, tensor in pair.theirs.items():
        if not name.endswith("input_global_scale"):
            assert torch.equal(pair.ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_on_an_fp32_model_the_input_scales_agree(run: Callable[..., Pair]) -> None:
    """To FP32 rounding: sequences of one length run side by side in ours, one by one in theirs."""
    pair = run("NVFP4", torch.float32)
    names = [name for name in pair.theirs if name.endswith("input_global_scale")]
    assert len(names) == 14
    for name in names:
        torch.testing.assert_close(pair.ours[name], pair.theirs[name], rtol=1e-5, atol=0)


def bf16_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Their global scale of a BF16 amax: the reciprocal is rounded to BF16, and the product again."""
    return (amax.bfloat16().reciprocal() * 2688).bfloat16().float()


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_on_a_bf16_model_every_difference_is_a_bf16_rounding(run: Callable[..., Pair], scheme: str) -> None:
    pair = run(scheme, torch.bfloat16)
    differing_scales = total_scales = 0
    for layer in range(2):
        for group in FUSED + ALONE:
            names = [f"model.layers.{layer}.{linear}" for linear in group]
            amax = torch.stack([pair.source[f"{name}.weight"].abs().max() for name in names]).max()
            for name in names:
                weight = pair.source[f"{name}.weight"]
                theirs = {part: pair.theirs[f"{name}.{part}"] for part in ("weight_packed", "weight_scale")}
                scale = pair.theirs[f"{name}.weight_global_scale"]
                assert torch.equal(scale, bf16_global_scale(amax).reshape(1)), "their G is the twice rounded one"
                assert torch.equal(
                    pair.ours[f"{name}.weight_global_scale"], nvfp4.global_scale(amax.float()).reshape(1)
                )

                rounded_max = (weight.unflatten(1, (-1, 16)).abs().amax(2) / 6).bfloat16().float()
                expected = (scale * rounded_max).clamp(max=448).to(torch.float8_e4m3fn)
                assert torch.equal(theirs["weight_scale"].view(torch.uint8), expected.view(torch.uint8))
                exact = nvfp4.group_scales(weight.float(), scale)
                differing_scales += int((exact != expected.float()).sum())
                total_scales += exact.numel()

                given = nvfp4.quantize_weight(weight, scale[0], theirs["weight_scale"].float())
                assert torch.equal(given.packed, theirs["weight_packed"]), "same scales, same bytes"
    assert 0 < differing_scales < 0.2 * total_scales


def test_on_a_bf16_model_the_input_scales_differ_by_rounding_alone(run: Callable[..., Pair]) -> None:
    """Theirs is rounded to BF16 twice, and the activations' amax may sit one BF16 step away: three roundings."""
    pair = run("NVFP4", torch.bfloat16)
    for name, theirs in pair.theirs.items():
        if name.endswith("input_global_scale"):
            torch.testing.assert_close(pair.ours[name], theirs, rtol=3 * 2**-8, atol=0)
            assert torch.equal(theirs, theirs.bfloat16().float()), "theirs is a BF16 number"
