"""A server of the quantized model drafts for the walk: what it says costs passes or saves them, never a token."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import load_quantized, load_source
from served import Handler
from test_drafting import GSM8K_LIKE, Models, greedy_tokens, kept_tokens, requests
from test_walk_lm_eval import write_tasks

import fourge
from fourge.errors import InputError
from fourge.evaluation.draft_server import DraftServer
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.engine_choice import choose_engine
from fourge.evaluation.walk_generation import WalkGeneration
from fourge.report.evaluate_text import evaluate_summary

MOST = 12


class DraftingServer:
    """vLLM's completions with `return_token_ids`, by transformers; from request `broken_from` on without ids."""

    def __init__(self, model: Any, max_length: int = 256, broken_from: int | None = None) -> None:
        self.model = model
        self.max_length = max_length
        self.broken_from = broken_from
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def __call__(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if body is None:
            return {"data": [{"id": "served", "max_model_len": self.max_length}]}
        assert path == "/v1/completions" and body["return_token_ids"] and body["temperature"] == 0
        assert len(body["prompt"]) + body["max_tokens"] <= self.max_length
        with self.lock, torch.no_grad():
            self.asked.append(body)
            if self.broken_from is not None and len(self.asked) >= self.broken_from:
                return {"choices": [{"text": "ba"}]}
            prompt = torch.tensor([body["prompt"]])
            tokens = self.model.generate(prompt, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0)
        return {"choices": [{"text": "", "token_ids": tokens[0, prompt.shape[1] :].tolist()}]}


def answer(models: Models, folder: Path, asked: list[Any], server: DraftServer) -> WalkGeneration:
    engine = WalkEngine(WalkSettings(*models, folder, "float32", "cpu"))
    lanes = dict(zip(engine.roles, engine.lanes, strict=True))
    made = WalkGeneration(lanes, engine.prompting, folder, 128, restart=False, server=server)
    made.answer(asked)
    return made


@pytest.mark.parametrize("served", ["the quantized model", "another one"])
def test_both_models_answers_are_the_walks(
    served: str,
    models: Models,
    pico: Callable[..., Path],
    serve: Callable[[Handler], str],
    tmp_path: Path,
) -> None:
    asked = requests(9, max_gen_toks=MOST, until=[])
    model = load_quantized(models[1]) if served == "the quantized model" else load_source(pico("qwen2"))
    server = DraftingServer(model)
    made = answer(models, tmp_path, asked, DraftServer(serve(server), concurrency=3))
    assert kept_tokens(tmp_path, "baseline") == greedy_tokens(load_source(models[0]), models[0], asked, MOST)
    assert kept_tokens(tmp_path, "quantized") == greedy_tokens(load_quantized(models[1]), models[1], asked, MOST)
    assert {outcome.drafted_by for outcome in made.outcomes.values()} == {"server"}
    quantized = made.outcomes["quantized"]
    if served == "the quantized model":
        assert quantized.passes == 1 and quantized.accepted == quantized.drafted
    else:
        assert quantized.passes > 3
    prompts = [request["prompt"] for request in server.asked]
    assert all(prompt[0] == 1 and prompt.count(1) == 1 for prompt in prompts[: len(asked)])


def test_a_server_that_reads_less_drafts_what_it_can(
    models: Models,
    serve: Callable[[Handler], str],
    tmp_path: Path,
) -> None:
    asked = requests(6, max_gen_toks=MOST, until=["w3"])
    server = DraftingServer(load_quantized(models[1]), max_length=30)
    answer(models, tmp_path, asked, DraftServer(serve(server), concurrency=1))
    theirs = greedy_tokens(load_source(models[0]), models[0], asked, MOST)
    ours = kept_tokens(tmp_path, "baseline")
    assert [tokens == full[: len(tokens)] for tokens, full in zip(ours, theirs, strict=True)] == [True] * 6
    assert all(request["stop"] == ["w3", "</s>"] for request in server.asked)


def test_a_server_that_fails_is_named_and_the_job_goes_on(
    models: Models,
    serve: Callable[[Handler], str],
    tmp_path: Path,
) -> None:
    asked = requests(6, max_gen_toks=MOST, until=[])
    broken = serve(DraftingServer(load_quantized(models[1]), broken_from=3))
    with pytest.raises(InputError, match=rf"--quantized-url: {broken} does not give token ids, as vLLM does"):
        answer(models, tmp_path, asked, DraftServer(broken, concurrency=1))
    whole = serve(DraftingServer(load_quantized(models[1])))
    answer(models, tmp_path, asked, DraftServer(whole, concurrency=1))
    assert kept_tokens(tmp_path, "baseline") == greedy_tokens(load_source(models[0]), models[0], asked, MOST)
    with pytest.raises(InputError, match=r"--quantized-url http://127\.0\.0\.1:1: no OpenAI server answers there"):
        answer(models, tmp_path / "other", asked, DraftServer("http://127.0.0.1:1", concurrency=1))


def test_evaluate_takes_a_server_of_the_quantized_model_for_drafts(
    models: Models,
    serve: Callable[[Handler], str],
    tmp_path: Path,
) -> None:
    (tmp_path / "tasks").mkdir()
    folder = write_tasks(tmp_path / "tasks", {"tiny_gsm8k": GSM8K_LIKE})
    options: dict[str, Any] = {
        "baseline": str(models[0]),
        "tasks": ["tiny_gsm8k"],
        "limit": 6,
        "include_path": folder,
        "device": "cpu",
        "compute_dtype": "float32",
        "threads": 1,
    }
    url = serve(DraftingServer(load_quantized(models[1])))
    drafted = fourge.evaluate(models[1], quantized_url=url, output=tmp_path / "server", **options)
    content = drafted.evaluations[0]
    assert content["engine"]["name"] == "walk" and content["engine"]["numerics"] == "W4A4 emulated"
    assert content["drafting"]["baseline"]["drafted_by"] == "server"
    assert "drafted by the quantized model's server" in evaluate_summary(drafted)
    alone = fourge.evaluate(models[1], output=tmp_path / "alone", **options)
    for role in ("baseline", "quantized"):
        ours, theirs = (
            (tmp_path / run / role / "samples_tiny_gsm8k.jsonl").read_text().splitlines() for run in ("server", "alone")
        )
        answers = [[json.loads(line)["resps"] for line in lines] for lines in (ours, theirs)]
        assert answers[0] == answers[1]
    assert alone.evaluations[0]["drafting"]["baseline"]["drafted_by"] == "quantized"


def test_which_engine_servers_mean(models: Models) -> None:
    paths: Any = {"baseline": models[0], "quantized": models[1]}
    url = {"quantized": "http://127.0.0.1:1"}
    assert choose_engine("auto", paths, url, "cpu") == "walk"  # type: ignore[arg-type]
    assert choose_engine("walk", paths, url, "cpu") == "walk"  # type: ignore[arg-type]
    alone: Any = {"quantized": models[1]}
    assert choose_engine("auto", alone, url, "cpu") == "vllm"  # type: ignore[arg-type]
    assert choose_engine("walk", alone, url, "cpu") == "walk"  # type: ignore[arg-type]
    both: Any = url | {"baseline": "http://127.0.0.1:2"}
    assert choose_engine("auto", paths, both, "cpu") == "vllm"
    with pytest.raises(InputError, match="--baseline-url is for --engine vllm"):
        choose_engine("walk", paths, both, "cpu")
    with pytest.raises(InputError, match="--quantized-url is for --engine vllm; --engine hf computes itself"):
        choose_engine("hf", paths, url, "cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="where is the baseline model served"):
        choose_engine("vllm", paths, url, "cpu")  # type: ignore[arg-type]
