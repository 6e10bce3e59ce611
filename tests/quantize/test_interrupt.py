"""Stopped from the outside: one line that says how to go on, exit code 2, and going on works."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LAYERS = 24


def committed(output: Path) -> int:
    manifest = output / ".fourge" / "job.json"
    return len(json.loads(manifest.read_text())["steps"]) if manifest.exists() else 0


def heed_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, which children inherit; here it must not be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(signum: signal.Signals, pico: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "fourge", "quantize", str(pico(num_hidden_layers=LAYERS)), "-o", str(output)]
    command += ["--calibration", "random", "--num-calibration-samples", "24", "--num-probe-samples", "6"]
    command += ["--max-seq-length", "200", "--threads", "1", "--method", "max"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        while committed(output) < 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signum)
        _, stderr = process.communicate()
    before = committed(output)
    assert process.returncode == 2
    assert 2 <= before < LAYERS + 2, "it ended before it could be stopped"
    last = stderr.splitlines()[-1]
    assert last.startswith("fourge: stopped") and "continue with: fourge quantize" in last and str(output) in last
    assert "Traceback" not in stderr
    assert not list(output.rglob("*.tmp"))
    again = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["continued"] is True
    assert committed(output) == LAYERS + 2
