"""Records become the tokens that the model would see: special tokens once, templates applied, errors named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourge.data import DataRequest, load_token_sets
from fourge.errors import InputError

WITH_BOS = "{{ bos_token }} {% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
WITHOUT_BOS = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"

Render = Callable[..., list[int]]


@pytest.fixture
def render(tmp_path: Path, request_for: Callable[..., DataRequest], vocab_size: int) -> Render:
    """`render(record, model directory, **request)`: the tokens of the only record of a file."""

    def run(record: dict[str, Any], directory: Path, vocab_size: int = vocab_size, **changes: Any) -> list[int]:
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps(record) + "\n")
        sets = load_token_sets(request_for(path, **changes), directory, vocab_size, None)
        (sequence,) = sets.calibration.sequences
        assert sequence.dtype == "int32" and sequence.ndim == 1
        return sequence.tolist()

    return run


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("prefix", ["", "<s> ", "<s> <s> "])
def test_text_has_bos_once_whoever_writes_it(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]], adds_bos: bool, prefix: str
) -> None:
    tokens = render({"text": f"{prefix}w1 w2 w3"}, model(adds_bos=adds_bos))
    assert tokens == ids("<s> w1 w2 w3" if adds_bos or prefix else "w1 w2 w3")


def test_bos_within_a_text_stays(render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]]) -> None:
    assert render({"text": "w1 <s> <s> w2"}, model()) == ids("<s> w1 <s> <s> w2")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [WITH_BOS, WITHOUT_BOS, "{{ bos_token }} " + WITH_BOS])
def test_a_conversation_has_the_special_tokens_of_its_template_and_no_other(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]], adds_bos: bool, template: str
) -> None:
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    tokens = render({"messages": messages}, model(adds_bos=adds_bos, chat_template=template))
    assert tokens == ids(("" if template == WITHOUT_BOS else "<s> ") + "<user> w1 w2 <assistant> w3")


def test_bos_in_the_first_message_does_not_double_the_template_s(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]]
) -> None:
    template = "{{ bos_token }} {{ messages[0].content }}"
    record = {"messages": [{"role": "user", "content": "<s> w1"}]}
    assert render(record, model(chat_template=template)) == ids("<s> w1")


EXCHANGE = "<user> w1 w2 </s> <assistant> w3 </s>"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]},
        {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]},
        {"prompt": "w1 w2", "response": "w3"},
        {"instruction": "w1 w2", "output": "w3", "input": ""},
        {"instruction": "w1", "input": "w2", "output": "w3"},
        {"instruction": "w1", "context": "w2", "response": "w3", "category": "qa"},
        {"question": "w1 w2", "answer": "w3"},
        {"text": None, "prompt": "w1 w2", "completion": "w3"},
    ],
)
def test_every_shape_of_an_exchange(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]], record: dict[str, Any]
) -> None:
    assert render(record, model()) == ids(EXCHANGE)


def test_messages_win_over_text_and_text_over_prompt(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]]
) -> None:
    record = {"prompt": "w7", "response": "w8", "text": "w9"}
    assert render(record, model()) == ids("<s> w9")
    assert render(record | {"messages": [{"role": "user", "content": "w5"}]}, model()) == ids("<user> w5 </s>")


def test_of_turns_without_answers_the_first_is_asked(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]]
) -> None:
    record = {"question_id": 81, "category": "writing", "turns": ["w1 w2", "w3"]}
    assert render(record, model()) == ids("<user> w1 w2 </s>")
    assert render(record, model(chat_template=None)) == ids("<s> w1 w2")


def test_an_exchange_is_plain_text_for_a_model_without_template(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]]
) -> None:
    assert render({"prompt": "w1\n", "response": "w2"}, model(chat_template=None)) == ids("<s> w1 w2")
    assert render({"instruction": "w1", "output": "w2"}, model(chat_template=None)) == ids("<s> w1 w2")


@pytest.mark.parametrize("length", [2, 3, 5])
def test_long_records_are_cut(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]], length: int
) -> None:
    text = " ".join(f"w{i}" for i in range(20))
    assert render({"text": text}, model(), max_seq_length=length) == ids(f"<s> {text}")[:length]


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(
    render: Render, model: Callable[..., Path]
) -> None:
    # As Llama 3.2's template does it; the words of the date are <unk> to this vocabulary, so length is what shows.
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }} w1"
    )
    record = {"messages": [{"role": "user", "content": "w2"}]}
    assert len(render(record, model(chat_template=template))) == len(["26", "Jul", "2024", "w1"])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 3 }}", "can only concatenate str"),
        ("{{ messages[0].x.y }}", "has no attribute 'x'"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_raises_is_one_line_with_the_record_and_its_words(
    tmp_path: Path, model: Callable[..., Path], request_for: Callable[..., DataRequest], template: str, said: str
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('\n{"messages": [{"role": "user", "content": "w1"}]}\n')
    directory = model(chat_template=template)
    with pytest.raises(InputError) as caught:
        load_token_sets(request_for(path), directory, 100, None)
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert f"--calibration {path}, line 2" in message and str(directory) in message and "correct the record" in message


def test_messages_without_a_template_are_refused(render: Render, model: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"line 1: a conversation, .* no chat template; put a chat_template\.jinja"):
        render({"messages": [{"role": "user", "content": "w1"}]}, model(chat_template=None))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"id": 3, "body": "w1"}, r"line 1: has the fields id, body; wanted are 'messages'"),
        ({"prompt": "w1"}, r"has the fields prompt; wanted"),
        ({}, r"has the fields none"),
        ({"text": ["w1"]}, r"'text' is a text in a usable record, here it is list \(\['w1'\]\)"),
        ({"messages": "w1"}, r"'messages' is a list of objects with 'role'"),
        ({"messages": [{"content": "w1"}]}, r"'messages' is a list of objects with 'role'"),
        ({"messages": ["w1"]}, r"'messages' is a list of objects with 'role'"),
        ({"conversations": [{"role": "user"}]}, r"'conversations' is a list of objects with 'from'"),
        ({"turns": [1]}, r"'turns' is a list of texts"),
        ({"prompt": "w1", "response": 4}, r"'response' is a text"),
    ],
)
def test_records_of_no_known_shape_are_named(
    render: Render, model: Callable[..., Path], record: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        render(record, model())


def test_a_tokenizer_that_is_not_the_model_s_is_refused(
    render: Render, model: Callable[..., Path], ids: Callable[[str], list[int]]
) -> None:
    (top,) = ids("w94")
    assert render({"text": "w1 w94"}, model(), vocab_size=top + 1)[-1] == top
    with pytest.raises(InputError, match=rf"gives token {top}, the model knows {top} "):
        render({"text": "w1 w94"}, model(), vocab_size=top)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_directory_without_tokenizer_is_refused(render: Render, tmp_path: Path, model_type: str) -> None:
    # Of a Qwen2 directory without its files transformers makes a tokenizer that maps every text to nothing.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match="tokenizer") as caught:
        render({"text": "w1 w2"}, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_refused(render: Render, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        render({"text": "w1 w2"}, tmp_path)
