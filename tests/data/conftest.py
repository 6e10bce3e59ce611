"""Model directories with a word-level tokenizer only, and requests with small numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourge.data import DataRequest

SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(95)]
IDS = {word: i for i, word in enumerate(SPECIAL + WORDS)}
VOCAB_SIZE = len(IDS)

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"


def write_tokenizer(directory: Path, *, adds_bos: bool, chat_template: str | None) -> Path:
    """A tokenizer of `SPECIAL + WORDS`, whose ids are their places, split at white space."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", IDS["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model(adds_bos=…, chat_template=…)`: such a directory. Not to be written to."""
    built: dict[tuple[bool, str | None], Path] = {}

    def get(adds_bos: bool = True, chat_template: str | None = TEMPLATE) -> Path:
        key = (adds_bos, chat_template)
        if key not in built:
            directory = tmp_path_factory.mktemp("model")
            built[key] = write_tokenizer(directory, adds_bos=adds_bos, chat_template=chat_template)
        return built[key]

    return get


@pytest.fixture(scope="session")
def request_for() -> Callable[..., DataRequest]:
    """A request for one calibration sequence of at most 64 tokens, no probe, seed 0, but for what is named."""

    def make(source: object, **changes: Any) -> DataRequest:
        given: dict[str, Any] = {
            "num_calibration_samples": 1,
            "num_probe_samples": 0,
            "max_seq_length": 64,
            "seed": 0,
        }
        return DataRequest(str(source), **(given | changes))

    return make


@pytest.fixture(scope="session")
def ids() -> Callable[[str], list[int]]:
    """The token ids of words and special tokens separated by blanks, from the vocabulary alone."""
    return lambda text: [IDS[word] for word in text.split()]


@pytest.fixture(scope="session")
def vocab_size() -> int:
    return VOCAB_SIZE
