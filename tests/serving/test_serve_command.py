"""What `vllm serve` is told, for which checkpoint, on which hardware."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fourge
from fourge import InputError
from fourge.cli import app
from fourge.serving import placement
from fourge.serving.command import base_url, is_loopback
from fourge.serving.placement import find_gpus
from fourge.serving.templates import choose_reasoning_parser, choose_tool_call_parser, reads_variable

HERMES_4 = (
    "{%- if thinking %}<|im_start|>system\nYou are a thinking AI <think> </think>{%- endif %}"
    "{%- if tools %}call as <tool_call>{{ tool | tojson }}</tool_call>{%- endif %}{{ messages[0]['content'] }}"
)
QWEN_3 = "{% if tools %}<tool_call>{% endif %}{% if enable_thinking is false %}<think>\n</think>{% endif %}"
QWEN_CODER = "{% if tools %}<tool_call>\n<function=name>{% endif %}"
THINK = frozenset({"<think>", "</think>"})


def options(command: str) -> dict[str, str]:
    """Options of a command line, each with what follows it."""
    words = shlex.split(command)
    return dict(zip(words, [*words[1:], ""], strict=True))


@pytest.fixture
def hermes(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint with a chat template that reads as Hermes 4's does, and its tokens."""
    output = Path(shutil.copytree(quantized(), tmp_path / "hermes"))
    (output / "chat_template.jinja").write_text(HERMES_4)
    stored = json.loads((output / "tokenizer.json").read_text())
    stored["added_tokens"] += [{"id": 126 + i, "content": word} for i, word in enumerate(sorted(THINK))]
    (output / "tokenizer.json").write_text(json.dumps(stored))
    return output


def printed(output: Path, **arguments: Any) -> dict[str, str]:
    return options(fourge.serve(output, print_command=True, **arguments).command)


def test_on_gpus_that_are_named(quantized: Callable[..., Path]) -> None:
    result = fourge.serve(quantized(), gpu="h200:2", print_command=True)
    told = options(result.command)
    assert result.command.startswith(f"vllm serve {quantized()} --served-model-name pico-nvfp4 ")
    assert told["--tensor-parallel-size"] == "2"
    assert told["--max-model-len"] == "256"
    assert told["--gpu-memory-utilization"] == "0.92"
    assert (told["--host"], told["--port"]) == ("127.0.0.1", "8000")
    assert told["--chat-template"] == str(quantized() / "chat_template.jinja")
    assert not told.keys() & {"--dtype", "--kv-cache-dtype", "--enforce-eager", "--linear-backend", "--api-key"}
    assert not told.keys() & {"--tool-call-parser", "--reasoning-parser", "--enable-auto-tool-choice"}
    assert (result.hardware, result.kernel, result.numerics) == ("2 × H200", "Marlin", "W4A16")


@pytest.mark.parametrize(
    ("gpu", "linear_backend", "kernel", "numerics"),
    [
        ("b200", None, "FP4 tensor cores", "W4A4"),
        ("h100", None, "Marlin", "W4A16"),
        ("h100", "emulation", "emulation", "W4A4"),
        ("mi300x", None, "emulation", "W4A4"),
    ],
)
def test_what_is_computed_where(
    gpu: str, linear_backend: Any, kernel: str, numerics: str, quantized: Callable[..., Path]
) -> None:
    result = fourge.serve(quantized(), gpu=gpu, linear_backend=linear_backend, print_command=True)
    assert (result.kernel, result.numerics) == (kernel, numerics)
    assert options(result.command).get("--linear-backend") == linear_backend


def test_a_weight_only_checkpoint_is_weight_only_everywhere(quantized: Callable[..., Path]) -> None:
    output = quantized(scheme="NVFP4A16", num_probe_samples=0)
    assert fourge.serve(output, gpu="b200", print_command=True).numerics == "W4A16"
    assert fourge.serve(output, print_command=True).numerics == "W4A16"


def test_before_bf16_the_activations_are_fp16(quantized: Callable[..., Path]) -> None:
    assert printed(quantized(), gpu_memory="16GiB", sm="7.5")["--dtype"] == "half"


def test_on_a_machine_with_no_gpu(quantized: Callable[..., Path]) -> None:
    result = fourge.serve(quantized(), print_command=True)
    told = options(result.command)
    assert result.command.startswith("VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model ")
    assert "--enforce-eager" in told and "--gpu-memory-utilization" not in told
    assert (result.hardware, result.numerics) == ("the CPU", "W4A4")


def test_the_plugin_may_be_told_to_leave_activations_alone(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURGE_VLLM_CPU", "w4a16")
    assert fourge.serve(quantized(), print_command=True).numerics == "W4A16"


def test_a_cache_in_fp8(quantized: Callable[..., Path]) -> None:
    assert printed(quantized(kv_cache_scheme="fp8"), gpu="b200")["--kv-cache-dtype"] == "fp8"
    assert printed(quantized(), gpu="b200", kv_cache_dtype="fp8")["--kv-cache-dtype"] == "fp8"


def test_nvidias_layout_is_told_the_same(quantized: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "modelopt"
    fourge.convert(str(quantized()), output, layout="modelopt")
    ours = fourge.serve(quantized(), gpu="b200:2", served_model_name="m", print_command=True)
    theirs = fourge.serve(output, gpu="b200:2", served_model_name="m", print_command=True)
    assert theirs.command.replace(str(output), str(quantized())) == ours.command
    assert (theirs.kernel, theirs.numerics) == (ours.kernel, ours.numerics)


# Templates


def test_hermes_gets_its_parsers(hermes: Path) -> None:
    told = printed(hermes, gpu="b200")
    assert told["--tool-call-parser"] == "hermes" and "--enable-auto-tool-choice" in told
    assert told["--reasoning-parser"] == "deepseek_v3"


def test_parsers_may_be_chosen(hermes: Path) -> None:
    told = printed(hermes, gpu="b200", tool_call_parser="none", reasoning_parser="qwen3")
    assert "--tool-call-parser" not in told and "--enable-auto-tool-choice" not in told
    assert told["--reasoning-parser"] == "qwen3"


def test_a_template_in_the_tokenizers_config_stays_there(hermes: Path) -> None:
    (hermes / "chat_template.jinja").unlink()
    path = hermes / "tokenizer_config.json"
    several = [{"name": "default", "template": HERMES_4}, {"name": "rag", "template": ""}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    told = printed(hermes, gpu="b200")
    assert "--chat-template" not in told and told["--tool-call-parser"] == "hermes"


def test_without_a_template_it_says_so(hermes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hermes / "chat_template.jinja").unlink()
    assert "--chat-template" not in printed(hermes, gpu="b200")
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "tokens", "tool_calls", "reasoning"),
    [
        (HERMES_4, THINK, "hermes", "deepseek_v3"),
        (HERMES_4, frozenset(), "hermes", None),
        (HERMES_4, frozenset({"<think>"}), "hermes", None),
        (QWEN_3, THINK, "hermes", "qwen3"),
        (QWEN_CODER, THINK, None, None),
        ("{{ messages }}", THINK, None, None),
        ("a thinking AI may call tools by <tool_call>", THINK, None, None),
    ],
)
def test_parsers_by_template(template: str, tokens: frozenset[str], tool_calls: Any, reasoning: Any) -> None:
    assert choose_tool_call_parser(template) == tool_calls
    assert choose_reasoning_parser(template, tokens) == reasoning


def test_what_a_template_reads_is_what_jinja_reads() -> None:
    jinja2 = pytest.importorskip("jinja2")
    meta = pytest.importorskip("jinja2.meta")
    templates = [HERMES_4, QWEN_3, QWEN_CODER, "{% if x == 'thinking' %}{% endif %}", '{{ "tools" }} thinking']
    for template in templates:
        undeclared = meta.find_undeclared_variables(jinja2.Environment().parse(template))
        for name in ("thinking", "enable_thinking", "tools"):
            assert reads_variable(template, name) == (name in undeclared), (template, name)


# This machine's GPUs

H200 = "NVIDIA H200, 143771, 9.0, {0}, GPU-{0}aaa"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`nvidia_smi(*rows)` puts a driver's tool with that answer on PATH."""

    def install(*rows: str) -> None:
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/sh\ncat <<'ROWS'\n" + "\n".join(rows) + "\nROWS\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
        monkeypatch.setattr(placement, "find_gpus", find_gpus)

    return install


def test_the_fewest_of_this_machines_gpus(quantized: Callable[..., Path], nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(*(H200.format(i) for i in range(8)))
    result = fourge.serve(quantized(), print_command=True)
    assert result.hardware == "1 × H200"
    assert "--tensor-parallel-size" not in options(result.command)
    assert fourge.serve(quantized(), tensor_parallel_size=2, print_command=True).hardware == "2 × H200"


@pytest.mark.parametrize(("visible", "count"), [("0,3", 2), ("GPU-2", 1), ("", None), ("-1", None)])
def test_hidden_gpus_do_not_count(visible: str, count: int | None, nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(*(H200.format(i) for i in range(4)))
    found = find_gpus({"CUDA_VISIBLE_DEVICES": visible})
    assert (None if found is None else found[1]) == count


def test_an_unknown_gpu_is_taken_as_it_says(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi("NVIDIA T4, 15360, 7.5, 0, GPU-a")
    found = find_gpus({})
    assert found is not None
    assert (found[0].name, found[0].memory, found[0].sm) == ("NVIDIA T4", 15360 << 20, 75)


def test_the_longest_known_name_wins(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi("NVIDIA GB200, 189471, 10.0, 0, GPU-a")
    found = find_gpus({})
    assert found is not None and found[0].name == "GB200"


def test_gpus_that_cannot_be(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(H200.format(0), "NVIDIA A100, 81920, 8.0, 1, GPU-b")
    with pytest.raises(InputError, match=r"different GPUs .*CUDA_VISIBLE_DEVICES"):
        find_gpus({})
    nvidia_smi("NVIDIA GB10, [N/A], 12.1, 0, GPU-a")
    with pytest.raises(InputError, match="does not tell its memory; give it by --gpu-memory"):
        find_gpus({})


def test_more_gpus_than_there_are(quantized: Callable[..., Path], nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(H200.format(0))
    with pytest.raises(InputError, match="this machine has 1 × H200; lower it"):
        fourge.serve(quantized(), tensor_parallel_size=2, print_command=True)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gpu": "b100"}, "b100 is not known; known are: B200"),
        ({"gpu": "b200:3"}, "tensor-parallel size 3 does not work: 4 attention heads do not divide by 3"),
        ({"gpu": "b200:2", "tensor_parallel_size": 4}, "disagree"),
        ({"gpu_memory": "2GiB", "sm": "12.0"}, "exceed the 1.8 GiB that the engine may take of each GPU"),
        ({"gpu_memory": "512MiB", "sm": "12.0"}, "exceed the 471.0 MiB that the engine may take of each GPU"),
        ({"gpu_memory": "16GiB", "sm": "7.0"}, "no NVFP4 kernel runs on SM70"),
        ({"gpu": "h200", "concurrency": 10**9}, "the KV cache holds"),
        ({"concurrency": 10**9}, "does not fit this machine's memory"),
        ({"max_model_len": 257}, "max_position_embeddings is 256; lower it"),
        ({"tensor_parallel_size": 2}, "is for GPUs and none is found here"),
        ({"linear_backend": "emulation"}, "is for GPUs and none is found here"),
        ({"extra": ["--api-key=secret"]}, "set VLLM_API_KEY instead"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], says: str, quantized: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as refused:
        fourge.serve(quantized(), print_command=True, **arguments)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_directories_that_cannot_be(pico: Callable[..., Path], quantized: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        fourge.serve(tmp_path / "nothing")
    with pytest.raises(InputError, match="nothing here is quantized"):
        fourge.serve(pico())
    unfinished = Path(shutil.copytree(quantized(), tmp_path / "unfinished"))
    (unfinished / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="the job is not finished; run the same `fourge quantize` command again"):
        fourge.serve(unfinished)


# Addresses and keys


def test_print_shows_no_key_and_warns_of_an_open_door(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["serve", str(quantized()), "--print", "--host", "0.0.0.0"]
    without = CliRunner().invoke(app, arguments)
    assert without.exit_code == 0 and "VLLM_API_KEY is not set" in without.stderr
    monkeypatch.setenv("VLLM_API_KEY", "correct horse")
    keyed = CliRunner().invoke(app, arguments)
    assert "WARNING" not in keyed.stderr and "horse" not in keyed.stdout + keyed.stderr
    assert shlex.split(keyed.stdout)[-1] != "" and keyed.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "loopback", "url"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:80"),
        ("localhost", True, "http://localhost:80"),
        ("::1", True, "http://[::1]:80"),
        ("0.0.0.0", False, "http://127.0.0.1:80"),
        ("::", False, "http://[::1]:80"),
        ("127.example.org", False, "http://127.example.org:80"),
        ("10.0.0.7", False, "http://10.0.0.7:80"),
    ],
)
def test_addresses(host: str, loopback: bool, url: str) -> None:
    assert is_loopback(host) is loopback
    assert base_url(host, 80) == url


def test_the_users_own_arguments_come_last(quantized: Callable[..., Path]) -> None:
    result = fourge.serve(quantized(), gpu="b200", extra=["--max-num-seqs=8", "--seed=1"], print_command=True)
    assert shlex.split(result.command)[-2:] == ["--max-num-seqs=8", "--seed=1"]
