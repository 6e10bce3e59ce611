"""An evaluation of a model twice as large as the memory that the kernel lets its process have."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'fourge[eval]'")

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "evaluate.py"


@pytest.mark.slow
def test_a_model_twice_the_memory_is_evaluated_within_it() -> None:
    """Both models of 1.8 GB walked under RLIMIT_DATA of 900 MB; lm-eval's own `hf` model is killed there."""
    command = [sys.executable, str(BENCHMARK), "--layers", "--requests", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hf in memory: did not" in done.stdout
