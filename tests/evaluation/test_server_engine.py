"""The `vllm` engine against an OpenAI server of our own, which transformers answers for: scores are lm-eval's."""

import gc
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Handler
from tiny_benchmarks import rows_of, write_jsonl

import fourge
from fourge.errors import InputError
from fourge.evaluation.server_engine import ask_server
from fourge.report.evaluate_text import evaluate_summary

pytest.importorskip("lm_eval", reason="needs lm-eval; pip install 'fourge[eval]'")

TASKS = {"arc_challenge": "allenai/ai2_arc/ARC-Challenge", "winogrande": "allenai/winogrande/winogrande_xl"}
SETTINGS: dict[str, Any] = {"device": "cpu", "compute_dtype": "float32", "threads": 1}


def listed(**facts: Any) -> dict[str, Any]:
    return {"data": [{"id": "pico", "max_model_len": 2048} | facts]}


class Served:
    """The part of vLLM's completions that lm-eval uses: the prompt's log-probabilities, echoed; prompts are kept."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prompts: list[list[int]] = []
        self.lock = threading.Lock()

    def __call__(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if path == "/v1/models":
            return listed()
        assert path == "/v1/completions" and body is not None
        assert (body["echo"], body["max_tokens"], body["model"]) == (True, 1, "pico")
        with self.lock:
            self.prompts += body["prompt"]
            return {"choices": [self.choice(index, tokens) for index, tokens in enumerate(body["prompt"])]}

    def choice(self, index: int, tokens: Sequence[int]) -> dict[str, Any]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logprobs = self.model(ids).logits[0].log_softmax(-1)
        chosen = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        best = logprobs.max(-1).values.tolist()
        # The token that is generated ends the lists, as it does in vLLM's answer.
        return {
            "index": index,
            "text": "",
            "logprobs": {
                "token_logprobs": [None, *chosen, best[-1]],
                "top_logprobs": [None, *({"best": value} for value in best)],
            },
        }


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_scores_are_those_of_the_hf_engine(
    chat: bool, concurrency: int, pico: Callable[..., Path], serve: Callable[[Handler], str], tmp_path: Path
) -> None:
    pytest.importorskip("tenacity", reason="needs lm-eval's api extra; pip install 'fourge[eval]'")
    from transformers import AutoModelForCausalLM

    directory = pico("llama", max_position_embeddings=2048)
    for task, folder in TASKS.items():
        for split in ("train", "validation", "test"):
            if (task, split) != ("winogrande", "test"):
                write_jsonl(tmp_path / "data" / folder / f"{split}.jsonl", rows_of(task, split))
    options = SETTINGS | {
        "baseline": str(directory),
        "tasks": list(TASKS),
        "num_fewshot": 2,
        "apply_chat_template": chat,
        "task_data": [tmp_path / "data"],
    }
    server = Served(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
    fourge.evaluate(engine="hf", output=tmp_path / "hf", **options)
    content = fourge.evaluate(
        baseline_url=serve(server), numerics="BF16", batch_size=concurrency, output=tmp_path / "served", **options
    ).evaluations[0]
    assert (content["engine"]["name"], content["engine"]["numerics"]) == ("vllm", "BF16")
    assert content["machine"] is None, "that of the server is not known"
    # BOS once, whether the template writes it or the tokenizer does.
    assert all(prompt.count(1) == 1 and prompt[0] == 1 for prompt in server.prompts)
    for row in fourge.compare(tmp_path / "hf" / "baseline", tmp_path / "served" / "baseline").tasks:
        assert row.delta is not None and row.delta.value == 0.0
        ours, theirs = (samples(tmp_path / name / "baseline", row.task) for name in ("served", "hf"))
        assert ours == [pytest.approx(values, abs=1e-4) for values in theirs]


def test_the_key_is_sent_and_never_shown(
    pico: Callable[..., Path],
    serve: Callable[[Handler], str],
    authorizations: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("tenacity", reason="needs lm-eval's api extra; pip install 'fourge[eval]'")
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("VLLM_API_KEY", "open-sesame")
    monkeypatch.setenv("OPENAI_API_KEY", "another's")
    directory = pico("llama", max_position_embeddings=2048)
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / TASKS["winogrande"] / f"{split}.jsonl", rows_of("winogrande", split))
    server = Served(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
    result = fourge.evaluate(
        baseline=str(directory),
        tasks=["winogrande"],
        limit=2,
        task_data=[tmp_path / "data"],
        baseline_url=serve(server),
        output=tmp_path / "served",
        **SETTINGS,
    )
    # The models are asked for, then log-likelihoods.
    assert len(authorizations) > 1 and set(authorizations) == {"Bearer open-sesame"}
    shown = capfd.readouterr()
    kept = [path.read_text() for path in (tmp_path / "served").rglob("*") if path.is_file()]
    assert kept
    for text in (shown.out, shown.err, caplog.text, evaluate_summary(result), *kept):
        assert "open-sesame" not in text


def test_a_server_that_gives_up_is_named(
    pico: Callable[..., Path], serve: Callable[[Handler], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tenacity", reason="needs lm-eval's api extra; pip install 'fourge[eval]'")
    from tenacity import wait_none

    monkeypatch.setattr("lm_eval.models.api_models.wait_exponential", lambda **options: wait_none())
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / TASKS["winogrande"] / f"{split}.jsonl", rows_of("winogrande", split))

    def answer(path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if body is not None:
            raise ConnectionAbortedError
        return listed()

    url = serve(answer)
    with pytest.raises(InputError, match=rf"--baseline-url {url}: stopped answering"):
        fourge.evaluate(
            baseline=str(pico("llama", max_position_embeddings=2048)),
            tasks=["winogrande"],
            task_data=[tmp_path / "data"],
            baseline_url=url,
            output=tmp_path / "served",
            **SETTINGS,
        )
    # lm-eval's unfinished bar closes itself when it is collected: here, and not while pytest compiles something.
    gc.collect()


def samples(folder: Path, task: str) -> list[list[float]]:
    """Log-likelihoods of every item's choices."""
    lines = (folder / f"samples_{task}.jsonl").read_text().splitlines()
    return [[float(response[0][0]) for response in json.loads(line)["resps"]] for line in lines]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/completions"])
def test_a_server_is_asked_what_it_serves(suffix: str, serve: Callable[[Handler], str]) -> None:
    url = serve(lambda path, body: listed())
    served = ask_server(url + suffix, "--baseline-url")
    assert (served.endpoint, served.name, served.max_length) == (f"{url}/v1/completions", "pico", 2048)


def test_servers_that_cannot_be_used(serve: Callable[[Handler], str]) -> None:
    two = serve(lambda path, body: {"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(InputError, match=r"serves 2 models \(a, b\); serve one model a server"):
        ask_server(two, "--quantized-url")
    silent = serve(lambda path, body: {"data": [{"id": "a"}]})
    with pytest.raises(InputError, match="does not say max_model_len"):
        ask_server(silent, "--quantized-url")
    other = serve(lambda path, body: {"hello": "world"})
    with pytest.raises(InputError, match="no OpenAI server answers there"):
        ask_server(other, "--quantized-url")
