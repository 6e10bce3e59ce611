"""A chat: what lines mean, what the model is given, what comes back; on a server and in process."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sse_server import SseServer
from typer.testing import CliRunner

import fourge
from fourge import InputError
from fourge.chatting import resident
from fourge.chatting.conversation import Command, Conversation, Mistake, Say, parse_line, split_thoughts
from fourge.chatting.models import RemoteModel, Sampling
from fourge.chatting.resident import ResidentModel, weights_in_memory
from fourge.chatting.terminal import Terminal, converse, save
from fourge.checkpoint.reader import Checkpoint
from fourge.cli import app
from fourge.serving.api import ApiError, Client, Delta, parse_events, parse_url

GREEDY = Sampling(temperature=0, max_tokens=12, thinking=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SseServer]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with SseServer() as running:
        yield running


def run(*arguments: str, lines: str = "Hi.\n") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["chat", *arguments], input=lines)
    return result.exit_code, result.stdout, result.stderr


# Lines


@pytest.mark.parametrize(
    ("line", "means"),
    [
        ("", None),
        ("  \n", None),
        ("Hi there.\n", Say("Hi there.")),
        (" /etc/passwd, what is it?", Say("/etc/passwd, what is it?")),
        ("/reset", Command("reset", "")),
        ("/save my chat.json\n", Command("save", "my chat.json")),
        ("/quit\n", Command("quit", "")),
    ],
)
def test_what_a_line_means(line: str, means: Any) -> None:
    assert parse_line(line) == means


def test_lines_that_mean_nothing() -> None:
    unknown, nameless = parse_line("/etc/passwd"), parse_line("/save ")
    assert isinstance(unknown, Mistake) and "known are /reset, /save, /help, /quit" in unknown.message
    assert isinstance(nameless, Mistake) and "/save chat.json" in nameless.message


def test_a_conversation() -> None:
    said = Conversation("Be brief.")
    said.say("Hi.")
    said.hear("Hello.")
    said.say("And?")
    said.hear("")  # no answer: as if it had not been asked
    assert said.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
    ]
    said.reset()
    assert said.messages == [{"role": "system", "content": "Be brief."}]


def joined(deltas: list[Delta]) -> tuple[str, str]:
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("<think>a <b> </thin k></think>\n\nYes.", "a <b> </thin k>", "Yes."),
        ("\n<think>\nwell</think>No <think> it is.", "\nwell", "No <think> it is."),
        ("Plain, </think> and all.", "", "Plain, </think> and all."),
        ("<thing>", "", "<thing>"),
        ("<thi", "", "<thi"),
        ("<think>never done</thi", "never done</thi", ""),
        ("", "", ""),
    ],
)
def test_thoughts_are_split_off_wherever_pieces_end(size: int, text: str, thought: str, said: str) -> None:
    pieces = [Delta("", text[i : i + size]) for i in range(0, len(text), size)]
    assert joined(list(split_thoughts(pieces))) == (thought, said)


def test_thoughts_that_the_server_split_off_pass_through() -> None:
    assert joined(list(split_thoughts([Delta("hm", ""), Delta("", "Yes.")]))) == ("hm", "Yes.")


def test_events() -> None:
    lines = [
        ": comment",
        "event: x",
        'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}',
        'data:{"choices":[{"delta":{"reasoning":"a"}}]}',
        'data: {"choices":[{"delta":{"reasoning_content":"b"}}]}',
        'data: {"choices":[{"delta":{"content":"c"}}]}',
        'data: {"choices":[]}',
        "data: [DONE]",
        "data: not read any more",
    ]
    assert list(parse_events(lines)) == [Delta("a", ""), Delta("b", ""), Delta("", "c")]
    with pytest.raises(ApiError, match="too long"):
        list(parse_events(['data: {"error": {"message": "too long"}}']))


@pytest.mark.parametrize("text", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_addresses(text: str) -> None:
    assert parse_url(text) == "http://h:1"


def test_addresses_that_are_none() -> None:
    with pytest.raises(InputError, match="is not a server's address"):
        parse_url("http://")
    with pytest.raises(InputError, match="set VLLM_API_KEY instead") as refused:
        parse_url("https://me:secret@h")
    assert "secret" not in str(refused.value)


# On a server


def test_in_a_pipe_standard_output_has_the_answers_alone(server: SseServer) -> None:
    code, out, err = run(server.url, "--system", "Be brief.", "--temperature", "0.5", lines="Hi.\n\nAnd?\n")
    assert (code, out) == (0, "Hello.\nHello.\n")
    assert err == f"chat: a-model at {server.url}\n"
    first, second = server.requests
    assert first == {
        "model": "a-model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}],
        "temperature": 0.5,
        "stream": True,
    }
    assert [message["content"] for message in second["messages"]] == ["Be brief.", "Hi.", "Hello.", "And?"]


def test_thinking(server: SseServer) -> None:
    server.pieces = [{"reasoning": "hm"}, {"content": "Yes."}]
    code, out, err = run(server.url, "--thinking", "--max-tokens", "5", lines="Well?\nSure?\n")
    assert (code, out) == (0, "Yes.\nYes.\n") and "hm" in err
    assert server.requests[0]["chat_template_kwargs"] == {"thinking": True, "enable_thinking": True}
    assert server.requests[0]["max_tokens"] == 5
    assert "hm" not in json.dumps(server.requests[1]["messages"]), "thoughts are not handed back"


def test_commands(server: SseServer, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    lines = f"Hi.\n/save {path}\n/save {path}\n/reset\n/nonsense\nAgain.\n/help\n/quit\nNever.\n"
    code, out, err = run(server.url, lines=lines)
    assert (code, out) == (0, "Hello.\nHello.\n")
    assert json.loads(path.read_text()) == {
        "model": "a-model",
        "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}],
    }
    assert f"saved to {path}" in err and f"{path} exists" in err and "/nonsense is no command" in err
    assert "Ctrl-C stops an answer" in err
    assert [len(request["messages"]) for request in server.requests] == [1, 1]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    assert "cannot be written" in save(Conversation(), "m", tmp_path / "no" / "file.json")


def test_keys(server: SseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "correct horse"
    code, out, err = run(server.url)
    assert code == 2 and "answers 401: Unauthorized" in err and "VLLM_API_KEY" in err and err.count("\n") == 1
    monkeypatch.setenv("VLLM_API_KEY", "correct horse")
    code, out, err = run(server.url)
    assert (code, out) == (0, "Hello.\n") and "horse" not in err


def test_servers_that_will_not_do(server: SseServer) -> None:
    code, _, err = run("http://127.0.0.1:9")
    assert code == 2 and "cannot be reached" in err and "`fourge serve`" in err
    code, _, err = run(server.url + "/nowhere")
    assert code == 2 and "answers 404" in err
    code, _, err = run(server.url + "/elsewhere")
    assert code == 2 and "answers 302" in err, "a redirect would carry the key along"


def test_an_error_ends_a_pipe(server: SseServer) -> None:
    server.status = 400
    code, out, err = run(server.url)
    assert (code, out) == (2, "") and "answers 400: the context is full" in err


class Typed(io.StringIO):
    """Standard input of someone at a terminal."""

    def isatty(self) -> bool:
        return True


def test_an_error_does_not_end_a_chat(server: SseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hi.", "Again."])

    def read(prompt: str) -> str:
        server.status = 400 if not server.requests else 200
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    notes, answers = io.StringIO(), Typed()
    terminal = Terminal(Typed(), answers, notes)
    model = RemoteModel(Client(server.url), "a-model")
    assert converse(model, Conversation(), Sampling(None, None, False), terminal) == 1
    assert "answers 400" in notes.getvalue() and answers.getvalue() == "Hello.\n"
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Again."}]


def test_ctrl_c_stops_an_answer_and_not_the_chat(server: SseServer) -> None:
    server.pieces = [{"content": "Hello"}] + [{"content": " again"}] * 600
    server.pause = 0.1
    terminal, own = pty.openpty()
    command = [sys.executable, "-m", "fourge", "chat", server.url]
    # In a session of its own whose terminal this is, so that Ctrl-C reaches it as from a keyboard.
    # A shell that starts these tests in the background has them ignore it.
    script = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command], stdin=own, stdout=own, stderr=own, start_new_session=True
    )
    os.close(own)
    seen = ""

    def expect(text: str) -> None:
        nonlocal seen
        limit = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < limit, seen
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    expect("/help lists the commands")
    expect("> ")
    os.write(terminal, b"Hi.\n")
    expect("Hello again")
    os.write(terminal, b"\x03")
    expect("(stopped)")
    expect("> ")
    server.pieces, server.pause = [{"content": "Still here."}], 0.0
    os.write(terminal, b"There?\n")
    expect("Still here.")
    expect("> ")
    os.write(terminal, b"\x04")
    assert process.wait(60) == 0
    os.close(terminal)
    before = server.requests[-1]["messages"]
    assert before[1]["content"].startswith("Hello again"), "what was said before Ctrl-C counts"
    assert before[2] == {"role": "user", "content": "There?"}


# In process


@pytest.fixture(scope="module")
def quantized(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("chatted") / "out"
    fourge.quantize(
        str(pico()),
        output,
        method="max",
        calibration="random",
        num_calibration_samples=4,
        num_probe_samples=0,
        threads=1,
    )
    return output


def generated(directory: Path, text: str, count: int) -> str:
    """What transformers itself makes of one user's turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    prompt = tokenizer(f"<s><user>{text}</s><assistant>", add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("which", ["source", "quantized"])
def test_greedy_answers_are_transformers_own(which: str, pico: Callable[..., Path], quantized: Path) -> None:
    directory = pico() if which == "source" else quantized
    options = ["--temperature", "0", "--max-tokens", "12", "--device", "cpu", "--threads", "1"]
    code, out, err = run(str(directory), *options, lines="ba da\n")
    assert code == 0
    assert out.split() == generated(directory, "ba da", 12).split()
    assert f"chat: {directory} in this process, through transformers on cpu in bfloat16" in err


def test_the_context_is_the_limit(pico: Callable[..., Path]) -> None:
    model = ResidentModel.load(str(pico()), None, torch.device("cpu"))
    with pytest.raises(InputError, match="fills the model's context; /reset it"):
        list(model.answer([{"role": "user", "content": "ba " * 300}], GREEDY))


def test_leaving_an_answer_stops_the_generation(pico: Callable[..., Path]) -> None:
    model = ResidentModel.load(str(pico()), None, torch.device("cpu"))
    model.model.generation_config.eos_token_id = None
    answer = model.answer([{"role": "user", "content": "ba"}], Sampling(1.0, None, False))
    next(answer)
    assert "generation" in {thread.name for thread in threading.enumerate()}
    answer.close()
    assert "generation" not in {thread.name for thread in threading.enumerate()}


def test_what_generate_raises_is_not_lost(pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResidentModel.load(str(pico()), None, torch.device("cpu"))
    monkeypatch.setattr(model.model, "generate", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.answer([{"role": "user", "content": "ba"}], GREEDY))


def test_what_it_holds_in_memory(pico: Callable[..., Path], quantized: Path) -> None:
    """A quantized model is held in BF16: as much as its source, whose file has the same parameters."""
    source, output = Checkpoint.open(pico()), Checkpoint.open(quantized)
    assert weights_in_memory(source) == sum(info.nbytes for info in source.tensors.values())
    extra = sum(info.nbytes for name, info in output.tensors.items() if name.endswith("global_scale"))
    assert weights_in_memory(output) == weights_in_memory(source) + extra


def test_models_that_cannot_chat_here(
    pico: Callable[..., Path], quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = tmp_path / "modelopt"
    fourge.convert(str(quantized), converted, layout="modelopt")
    code, _, err = run(str(converted), "--device", "cpu")
    assert code == 2 and "transformers does not read NVIDIA's layout" in err
    code, _, err = run(str(pico()), "--thinking", "--device", "cpu")
    assert code == 2 and "has no such switch" in err
    code, _, err = run("no/such/directory/at/all", "--device", "cpu")
    assert code == 2 and "no such file or directory" in err
    monkeypatch.setattr(resident, "available_memory", lambda: 1000)
    code, _, err = run(str(pico()), "--device", "cpu")
    assert code == 2 and "too large to chat with in this process" in err and "`fourge serve`" in err


def test_a_base_model_is_no_model_to_chat_with(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(pico(), tmp_path / "base"))
    (model / "chat_template.jinja").unlink()
    code, _, err = run(str(model), "--device", "cpu")
    assert code == 2 and "has no chat template" in err and "instruct" in err
