"""The benchmark's evaluator measures what it says: against textbook sums, and against the walk's own figures."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fourge

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import fidelity_eval
from fidelity_table import table
from measured import run_measured

GRID = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def textbook_weight(packed: torch.Tensor, scales: torch.Tensor, divisor: float) -> torch.Tensor:
    """One value after the other."""
    values = torch.zeros(packed.shape[0], 2 * packed.shape[1])
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            byte = int(packed[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            value = GRID[code & 7] * float(scales[row, column // 16]) / divisor
            values[row, column] = -value if code & 8 else value
    return values


def textbook_kl(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean over the rows of the sum of p log(p/q), in Python's floats."""
    total = 0.0
    for p_logits, q_logits in zip(before.tolist(), after.tolist(), strict=True):
        p_sum, q_sum = (sum(math.exp(x) for x in logits) for logits in (p_logits, q_logits))
        for x, y in zip(p_logits, q_logits, strict=True):
            total += math.exp(x) / p_sum * (x - math.log(p_sum) - y + math.log(q_sum))
    return total / len(before)


@pytest.fixture(scope="module")
def scored(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A pico model quantized by us, and what the evaluator says of it."""
    folder = tmp_path_factory.mktemp("scored")
    source, output = pico(), folder / "out"
    sets = {"num_calibration_samples": 4, "num_probe_samples": 3, "max_seq_length": 24}
    result = fourge.quantize(str(source), output, method="max", calibration="random", threads=1, **sets)  # type: ignore[arg-type]
    tokens = output / ".fourge" / "tokens.safetensors"
    scores = fidelity_eval.evaluate(str(source), str(output), tokens, folder / "cache")
    again = fidelity_eval.evaluate(str(source), str(output), tokens, folder / "cache")
    return {"source": source, "output": output, "own": result.fidelity, "scores": scores, "again": again}


def test_w4a4_is_what_the_walk_reported(scored: dict[str, Any]) -> None:
    """Two programs that share no line: transformers with compressed-tensors, and our nvfp4 lane."""
    own, seen = scored["own"], scored["scores"]["W4A4"]
    assert seen["kl"][0] == pytest.approx(own["kl_div"]["mean"], rel=1e-4)
    assert seen["kl"][1] == pytest.approx(own["kl_div"]["standard_error"], rel=1e-3)
    assert seen["top1"] == pytest.approx(list(own["top1_agreement"].values())[:2])
    ratio = own["perplexity_nvfp4"]["mean"] / own["perplexity_bf16"]["mean"]
    assert seen["perplexity_ratio"][0] == pytest.approx(ratio, rel=1e-4)
    assert seen["tokens"] == own["kl_div"]["tokens"]


def test_w4a16_is_the_source_with_textbook_weights(scored: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(scored["source"], dtype=torch.float32).eval()
    after = AutoModelForCausalLM.from_pretrained(scored["source"], dtype=torch.float32).eval()
    stored = {
        name: tensor for path in scored["output"].glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("weight_packed")]:
        packed, scales = stored[f"{name}_packed"], stored[f"{name}_scale"].float()
        weight = textbook_weight(packed, scales, float(stored[f"{name}_global_scale"]))
        after.get_parameter(name).data = weight
    kl = []
    for tokens in fidelity_eval.read_probe(scored["output"] / ".fourge" / "tokens.safetensors"):
        with torch.no_grad():
            kl.append(textbook_kl(*(model(tokens[None]).logits[0, :-1] for model in (before, after))))
    assert scored["scores"]["W4A16"]["kl"][0] == pytest.approx(np.mean(kl), rel=1e-4)
    assert scored["scores"]["W4A16"]["kl"][0] < scored["scores"]["W4A4"]["kl"][0]


def test_kept_logits_of_the_source_change_nothing(scored: dict[str, Any]) -> None:
    assert scored["again"] == scored["scores"]


def test_clustered_error_is_that_of_the_sequences_means() -> None:
    """Of sequences of one length it is the standard error of their means; of others, worked by hand."""
    means = np.array([0.1, 0.4, 0.2, 0.7])
    mean, error = fidelity_eval.clustered_mean(means * 8, [8] * 4)
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / 2)
    # Sums 2 and 1 over 1 and 2 tokens: the mean is 1, the residuals are 1 and -1, (2 / 1 · 2)^½ / 3.
    assert fidelity_eval.clustered_mean([2, 1], [1, 2]) == pytest.approx((1, 2 / 3))


def test_table_compares_with_our_max() -> None:
    def row(tool: str, label: str, kl: float) -> dict[str, Any]:
        scores = {"kl": [kl, 0.01], "top1": [0.5, 0.01], "perplexity_ratio": [1.5, 0.1]}
        both = {"W4A4": scores, "W4A16": scores}
        cost = {"seconds": 2.0, "cpu_seconds": 3.0, "peak_resident_bytes": 10**9, "validation_tokens": 0}
        return {"tool": tool, "label": label, "scores": both, **cost}

    rows = [row("fourge", "replay", 0.1), {"tool": "x", "label": "y", "failed": 1}, row("fourge", "max", 0.4)]
    lines = table(rows).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines[:2]] == ["1.00", "0.25"]
    assert lines[2].startswith("| x | y | failed: 1 |")


def test_a_row_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """The grandchild holds the pipe that is read to its end: left alive, it would hold the row too."""
    spawn = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with pytest.raises(subprocess.TimeoutExpired):
        run_measured([sys.executable, "-c", spawn], tmp_path / "log", timeout=0.5)
    done = run_measured([sys.executable, "-c", "print(1); print(2)"], tmp_path / "log", timeout=60)
    assert done.last_line == "2" and done.peak_bytes > 1e6
    with pytest.raises(subprocess.CalledProcessError):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")
    assert (tmp_path / "log").read_text().count("$ ") == 3
