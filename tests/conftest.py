"""Pico models: real architectures of transformers at a size that quantizes in a second, built anew each session."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fourge.nvfp4.backend import using

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

SHARED = Path(__file__).resolve().parents[2] / "shared"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = [left + right for left in "bdfgkl" for right in ("a", "e", "i", "o", "u")]


def save_tokenizer(directory: Path, vocab_size: int) -> None:
    """A word-level tokenizer with BOS, EOS and a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    words = special + WORDS + [f"w{i}" for i in range(vocab_size - len(special) - len(WORDS))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)


def build_pico(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A BF16 checkpoint of two layers with outlier channels, so that quantizing it costs something."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = changes.pop("dtype", torch.bfloat16)
    max_shard_size = changes.pop("max_shard_size", "5GB")
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
    } | changes
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.ndim == 2:
                parameter.normal_(0, 0.15)
                parameter[:, ::17] *= 4
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory, settings["vocab_size"])
    (directory / "LICENSE").write_text("a licence\n")
    return directory


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pico(architecture, **config)`: the path of such a model, built once a session. Not to be written to."""
    built: dict[str, Path] = {}

    def get(architecture: str = "llama", **changes: Any) -> Path:
        key = json.dumps([architecture, changes], sort_keys=True, default=str)
        if key not in built:
            built[key] = build_pico(tmp_path_factory.mktemp(architecture) / "model", architecture, **changes)
        return built[key]

    return get


@pytest.fixture(scope="session")
def needs_backend() -> Callable[[str], None]:
    """Skips a test where a backend does not compute on a CPU here; Triton does in its interpreter alone."""

    def needs(name: str) -> None:
        pytest.importorskip(name)
        if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton computes on the GPU here: TRITON_INTERPRET=1 tests it on the CPU, `-m gpu` where it is")

    return needs


@pytest.fixture(scope="module", params=["torch", "numba", "triton"])
def every_backend(request: pytest.FixtureRequest, needs_backend: Callable[[str], None]) -> Iterator[str]:
    """Runs a module's tests once with each backend that computes on a CPU."""
    needs_backend(request.param)
    with using(request.param):
        yield request.param


@pytest.fixture
def shared() -> Path:
    """The folder of real models and text beside the checkout; tests that use it are marked `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name}/ is not beside the checkout: real models and text are missing")
    return SHARED


NOT_RUN: dict[str, int] = {}
WHY_NOT_RUN = {
    "slow": "takes minutes, or an environment with llm-compressor or Model-Optimizer: `make test-slow` builds them",
    "gpu": "needs a CUDA device; `pytest -m gpu` there",
    "vllm": "needs an environment with vLLM: `make test-vllm` builds one",
    "shared": "needs the folder shared/ beside the checkout",
}


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in WHY_NOT_RUN:
            if item.get_closest_marker(marker):
                NOT_RUN[marker] = NOT_RUN.get(marker, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker process of a parallel run hands its count to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = NOT_RUN


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects every test, so their counts are the same."""
    NOT_RUN.update(node.workeroutput.get("not_run", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says what was not run and why, so that a green run does not look like more than it is."""
    skipped = terminalreporter.stats.get("skipped", [])
    for marker, why in WHY_NOT_RUN.items():
        deselected, kept_out = NOT_RUN.get(marker, 0), sum(marker in report.keywords for report in skipped)
        terminalreporter.write_line(
            f"not run: {deselected + kept_out} {marker} ({why}): {deselected} deselected, {kept_out} skipped"
        )
    reasons = Counter(
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in skipped
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped: {count} ({reason.removeprefix('Skipped: ')})")
