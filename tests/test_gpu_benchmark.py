"""The GPU's benchmark runs as a whole where there is no GPU, tiny and in Triton's interpreter; else it says why not."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourge.nvfp4.quantize import QuantizedWeight

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, as Triton's interpreter
def test_interpreted_it_runs_to_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], needs_backend: Callable[[str], None]
) -> None:
    needs_backend("triton")
    gpu.main(["--interpret", "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["equal"] == 24 and "24 results of Triton's are torch's, bit for bit" in printed
    assert {rate["operation"] for rate in figures["bandwidth"] if rate["whose"] == "fourge"} == {
        *("amax", "encode", "encode, scales given", "decode", "fake-quantize", "squared errors"),
        *("search", "weighted search"),
    }
    assert all(rate["seconds"] > 0 and rate["bytes"] > 0 for rate in figures["bandwidth"] if rate["error"] is None)
    assert [row["group"] for row in figures["layer"]] == ["q/k/v", "down"]
    encoded = next(rate for rate in figures["bandwidth"] if rate["operation"] == "encode")
    assert encoded["bytes"] == 9 * 64 * 2 + 9 * 64 // 2 + 9 * 64 // 16
    assert printed.splitlines()[-1].startswith("| a layer's Linears: forward ")


def test_bits_that_differ_end_it(monkeypatch: pytest.MonkeyPatch, needs_backend: Callable[[str], None]) -> None:
    needs_backend("triton")
    made: list[torch.Tensor] = []

    def another_each_time(weight: torch.Tensor, h: torch.Tensor) -> dict[str, torch.Tensor]:
        made.append(torch.tensor([len(made)]))
        return {"encode": made[-1], "decode": torch.zeros(1)}

    same = QuantizedWeight(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1), torch.ones(1))
    monkeypatch.setattr(gpu, "everything", another_each_time)
    monkeypatch.setattr(gpu, "replayed", lambda weight, curvature, window: same)
    with pytest.raises(SystemExit, match=r"not torch's on cpu: encode of 3 × 48 in torch\.bfloat16; encode of 3 × 48"):
        gpu.identity(torch.device("cpu"), interpreted=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a CUDA device" in line
