"""`fourge serve` with real vLLM, whose drafts `fourge evaluate` takes: the answers are the walk's, unchanged."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_vllm_cpu import PICO, VLLM_PYTHON

import fourge
from fourge.evaluation.draft_server import DraftServer
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.requests import GenerateRequest
from fourge.evaluation.walk_generation import WalkGeneration
from fourge.serving.api import Client

pytestmark = pytest.mark.vllm

_PATIENCE = 300.0


@pytest.fixture(scope="module")
def quantized(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("served") / "out"
    samples = {"num_calibration_samples": 6, "num_probe_samples": 1, "max_seq_length": 24}
    fourge.quantize(str(pico("llama", **PICO)), output, calibration="random", **samples)
    return output


@pytest.fixture(scope="module")
def url(quantized: Path) -> Iterator[str]:
    """A server of the quantized model, as `fourge serve` starts it."""
    if not VLLM_PYTHON.exists():
        pytest.skip(f"{VLLM_PYTHON} is not there: `make test-vllm` builds it, FOURGE_VLLM_PYTHON names another")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fourge", "serve", str(quantized), "--port", str(port)]
    log = quantized.with_name("serve.log")
    with log.open("w") as file:
        command += ["--vllm-python", str(VLLM_PYTHON), "--max-model-len", "128", "--extra=--dtype=float32"]
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _PATIENCE
        while not Client(address).is_healthy():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def test_vllm_drafts(url: str, quantized: Path, pico: Callable[..., Path], tmp_path: Path) -> None:
    asked = [
        GenerateRequest(text, {"do_sample": False, "max_gen_toks": 16, "until": ["w9"]})
        for text in ("ba be bi", "da w7 w11 fo fu", "ga", "w20 w21 w22 w23 ka")
    ]
    texts, outcomes = {}, {}
    for name, server in (("served", DraftServer(url, 2)), ("alone", None)):
        engine = WalkEngine(WalkSettings(pico("llama", **PICO), quantized, tmp_path / name, "float32", "cpu"))
        lanes = dict(zip(engine.roles, engine.lanes, strict=True))
        made = WalkGeneration(lanes, engine.prompting, tmp_path / name, 128, restart=False, server=server)
        texts[name], outcomes[name] = made.answer(asked), made.outcomes
    assert texts["served"] == texts["alone"]
    assert outcomes["served"]["quantized"].drafted_by == "server"
    # In FP32 vLLM and our lane agree but for a rounding of an activation here and there.
    assert outcomes["served"]["quantized"].accepted > outcomes["served"]["quantized"].drafted / 2
