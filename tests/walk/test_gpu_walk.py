"""The walk on a CUDA device, method by method: it decides as on a CPU, to the bit where no sum does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fourge
from fourge.checkpoint.reader import Checkpoint
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.requests import ScoreRequest
from fourge.methods import METHODS
from fourge.methods.hessian import HessianAccumulator
from fourge.walk.ahead import read_tensor
from fourge.walk.job import Job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SETS: dict[str, Any] = {
    "calibration": "random",
    "num_calibration_samples": 24,
    "num_validation_samples": 8,
    "num_probe_samples": 4,
    "max_seq_length": 40,
    "threads": 1,
}
WEIGHT_ONLY: dict[str, Any] = {"scheme": "NVFP4A16", "calibration": "none", "threads": 1}
Pico = Callable[..., Path]


def shards(output: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
    assert found
    return found


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}


def equal_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], kind: str) -> float:
    """The share of equal bytes in the tensors of this kind."""
    equal = [one[name].view(torch.uint8) == other[name].view(torch.uint8) for name in one if name.endswith(kind)]
    return float(torch.cat([bits.flatten() for bits in equal]).float().mean())


@pytest.mark.parametrize("smooth", [False, True], ids=["", "smooth"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_quantizes_as_a_cpu_does(method: str, smooth: bool, pico: Pico, tmp_path: Path) -> None:
    """In FP32 on both. Sums come in another order, so what hangs on a tie may fall on its other side."""
    settings = SETS | {"method": method, "smooth": smooth, "compute_dtype": "float32"}
    here = fourge.quantize(str(pico()), tmp_path / "cpu", device="cpu", **settings)
    there = fourge.quantize(str(pico()), tmp_path / "cuda", device="cuda", **settings)
    assert (there.device, there.backend) == ("cuda", "triton")
    assert here.fidelity is not None and there.fidelity is not None
    assert there.fidelity["kl_div"]["mean"] == pytest.approx(here.fidelity["kl_div"]["mean"], rel=0.05)
    one, other = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    assert one.keys() == other.keys()
    least = 0.6 if method == "tuned" else 0.9 if METHODS[method].needs_hessian else 0.999
    assert equal_bytes(one, other, ".weight_packed") > least
    if method == "max" and not smooth:
        assert equal_bytes(one, other, ".weight_packed") == equal_bytes(one, other, ".weight_scale") == 1


@pytest.mark.parametrize("method", METHODS)
def test_what_a_gpu_wrote_is_what_it_should_be(method: str, pico: Pico, tmp_path: Path) -> None:
    """In the GPU's own arithmetic, BF16; read back, held against the source, and walked again in both lanes."""
    output = tmp_path / "out"
    result = fourge.quantize(str(pico()), output, method=method, smooth=True, kv_cache_scheme="fp8", **SETS)
    assert result.device == "cuda" and result.events == 0
    report = fourge.verify(output, source=str(pico()), deep=True, device="cuda")
    assert report.passed
    log = [json.loads(line) for line in (output / ".fourge" / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["peak_gpu_bytes"] > 0 for entry in log) and log[0]["machine"]["gpu"]


@pytest.mark.parametrize("method", METHODS)
def test_both_backends_write_the_same_files(method: str, pico: Pico, tmp_path: Path) -> None:
    for backend in ("torch", "triton"):
        settings = SETS | {"method": method, "smooth": True, "backend": backend, "device": "cuda"}
        fourge.quantize(str(pico()), tmp_path / backend, **settings)
    assert shards(tmp_path / "torch") == shards(tmp_path / "triton")


@pytest.mark.parametrize("method", ["max", "search"])
def test_without_data_a_gpu_writes_the_cpus_bytes(method: str, pico: Pico, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        fourge.quantize(str(pico()), tmp_path / device, method=method, device=device, **WEIGHT_ONLY)
    assert shards(tmp_path / "cpu") == shards(tmp_path / "cuda")


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETS | {"method": "replay", "smooth": True, "device": "cuda"}
    fourge.quantize(str(pico()), tmp_path / "whole", **settings)
    commit = Job.commit

    def stop_at_the_second_layer(job: Job, record: Any) -> None:
        if job.next_step == 2:
            raise KeyboardInterrupt
        commit(job, record)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Job, "commit", stop_at_the_second_layer)
        fourge.quantize(str(pico()), tmp_path / "stopped", **settings)
    assert fourge.quantize(str(pico()), tmp_path / "stopped", **settings).continued
    assert shards(tmp_path / "stopped") == shards(tmp_path / "whole")


def test_a_mixture_with_fp8_on_a_gpu(pico: Pico, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    rules = [{"targets": "re:.*down_proj", "scheme": "FP8"}, {"targets": "re:.*o_proj", "method": "search"}]
    recipe.write_text(json.dumps({"rules": rules}))
    for device in ("cpu", "cuda"):
        settings = SETS | {"method": "max", "compute_dtype": "float32", "device": device}
        fourge.quantize(str(pico()), tmp_path / device, recipe_file=recipe, **settings)
    one, other = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    assert all(one[name].equal(other[name]) for name in one if "down_proj" in name)
    assert fourge.verify(tmp_path / "cuda", source=str(pico()), deep=True, device="cuda").passed


def test_text_sampled_on_a_gpu(pico: Pico, tmp_path: Path) -> None:
    settings = SETS | {"calibration": "self", "device": "cuda", "method": "max"}
    result = fourge.quantize(str(pico()), tmp_path / "out", **settings)
    assert result.fidelity is not None and 0 < result.fidelity["kl_div"]["mean"] < 1


def requests() -> list[ScoreRequest]:
    """Some with a common beginning, so that rows branch."""
    rng = np.random.default_rng(5)
    beginning = rng.integers(3, 128, 20)
    made = []
    for _ in range(12):
        made.append(ScoreRequest(np.concatenate((beginning, rng.integers(3, 128, 6))).astype(np.int32), 4))
        made.append(ScoreRequest(rng.integers(3, 128, int(rng.integers(5, 60))).astype(np.int32), 3))
    return made


def test_a_gpu_scores_as_a_cpu_does(pico: Pico, tmp_path: Path) -> None:
    output = tmp_path / "out"
    fourge.quantize(str(pico()), output, method="max", device="cpu", **SETS)
    asked = requests()
    scores = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        settings = WalkSettings(pico(), output, tmp_path / f"{device}-{dtype}", dtype, device, micro_batch_tokens=64)
        engine = WalkEngine(settings)
        found = engine.score(asked)
        scores[device, dtype] = [[found[role][request.key][0] for request in asked] for role in found]
        assert engine.outcome is not None and engine.outcome.tokens_walked < engine.outcome.tokens_requested
    expected = torch.tensor(scores["cpu", "float32"])
    precise, rough = ((torch.tensor(scores["cuda", dtype]) - expected).abs() for dtype in ("float32", "bfloat16"))
    # Of the quantized lane's activations some lie at a tie.
    assert precise[0].max() < 1e-3 and precise[1].mean() < 0.05
    assert rough[0].mean() < 0.2 and rough[1].mean() < 1.0


def test_a_gpu_ranks_as_a_cpu_does(pico: Pico, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        settings: dict[str, Any] = {"calibration": "random", "max_seq_length": 40, "compute_dtype": "float32"}
        settings |= {"num_calibration_samples": 12, "num_validation_samples": 8, "method": "search"}
        result = fourge.sensitivity(str(pico()), tmp_path / device, device=device, **settings)
        found.append({group.linears: group.damage["NVFP4"]["mean"] for group in result.groups})
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_a_tensor_reaches_the_gpu_in_pieces(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourge.walk.ahead._PIECE_BYTES", 1000)
    source = Checkpoint.open(pico())
    for name in source.tensors:
        assert read_tensor(source, name, torch.device("cuda")).cpu().equal(source.read(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hessian_of_16_bits_is_that_of_their_values(dtype: torch.dtype) -> None:
    x = (torch.randn(3000, 2080) * torch.randn(2080).exp()).to(dtype)
    accumulator = HessianAccumulator(2080, "cuda")
    for part in torch.split(x.cuda(), 1000):
        accumulator.add(part)
    exact = x.double().T @ x.double()
    found = accumulator.matrix.cpu().double()
    assert float((found - exact).norm() / exact.norm()) < 1e-5
    torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=1e-4, atol=0)
