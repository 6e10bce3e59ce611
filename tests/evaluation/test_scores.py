"""The walk's log-likelihoods and greedy flags against lm-eval's own `hf` model, in FP32."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import hf_model, instances, load_quantized, load_source, word_tokenizer, words
from safetensors.torch import load_file, save_file

import fourge
from fourge.errors import InputError
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.requests import Role, ScoreRequest, score_request
from fourge.evaluation.walk_lm import Recorder, Replay, WalkLM
from fourge.walk.statistics import clustered_mean

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-sliding-window": ("mistral", {"sliding_window": 8}),
    "qwen2-sliding-upper-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
MAX_LENGTH = 64
FP32_ROUNDING = {"abs": 3e-5, "rel": 2e-7}
"""Nats: lm-eval sums FP32 log-softmaxes in FP32, so a sum of 400 nats is good to 3e-5 at best."""
SETS: dict[str, Any] = {
    "method": "max",
    "calibration": "random",
    "num_calibration_samples": 4,
    "num_probe_samples": 1,
    "max_seq_length": 24,
    "threads": 1,
}


def pairs() -> list[tuple[str, str]]:
    """Contexts and continuations: choices, shared shots, single tokens, duplicates, empty contexts, too long ones."""
    rng = np.random.default_rng(2)
    shots = words(rng, 30)
    asked = [f"{shots} {words(rng, 4)}" for _ in range(5)] + [words(rng, 3)]
    made = [(question, f" {words(rng, count)}") for question in asked for count in (1, 1, 2, 5)]
    made += [("", words(rng, 3)), ("", "<s> " + words(rng, 2)), (words(rng, 2) + "  ", words(rng, 1))]
    made += [(words(rng, 90), " " + words(rng, 3)), (words(rng, 10), " " + words(rng, MAX_LENGTH))]
    # The text goes on where another's continuation ends: one sequence is the beginning of the other.
    made += [(asked[0], made[0][1] + " " + words(rng, 4)), made[0], made[-1]]
    return made


def texts() -> list[tuple[str]]:
    """Whole texts: some longer than the model reads at once, one of a single word, one twice."""
    rng = np.random.default_rng(3)
    made = [(words(rng, count),) for count in (1, 7, MAX_LENGTH - 1, MAX_LENGTH, 3 * MAX_LENGTH + 5)]
    return [*made, made[1], ("",)]


def engine(folder: Path, baseline: Path | None, quantized: Path | None = None, **changes: Any) -> WalkEngine:
    options: dict[str, Any] = {"micro_batch_tokens": 96, "max_length": MAX_LENGTH} | changes
    walk = WalkEngine(WalkSettings(baseline, quantized, folder, "float32", "cpu", **options))
    walk.tokenizer = word_tokenizer(walk.lanes[0].checkpoint.directory)
    return walk


def walked(walk: WalkEngine, role: Role = "baseline") -> Any:
    """An LM that answers `pairs()` and `texts()` from the walk."""
    recorder = Recorder()
    asking = WalkLM(walk.prompting, recorder)
    asking.loglikelihood(instances("loglikelihood", pairs()))
    asking.loglikelihood_rolling(instances("loglikelihood_rolling", texts()))
    scores = walk.score(list(recorder.to_score.values()), recorder.tokens_requested)
    return WalkLM(walk.prompting, Replay(scores[role], {}))


def require_same_answers(ours: Any, theirs: Any) -> None:
    asked = instances("loglikelihood", pairs())
    got, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    for (likelihood, greedy), (reference, is_greedy) in zip(got, expected, strict=True):
        assert likelihood == pytest.approx(reference, **FP32_ROUNDING)
        assert greedy == is_greedy
    rolling = instances("loglikelihood_rolling", texts())
    for likelihood, reference in zip(
        ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling), strict=True
    ):
        assert likelihood == pytest.approx(reference, **FP32_ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_lane_answers_as_lm_evals_hf_model(name: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    architecture, changes = MODELS[name]
    model = pico(architecture, **changes)
    walk = engine(tmp_path, model)
    theirs = hf_model(load_source(model), model, max_length=MAX_LENGTH)
    require_same_answers(walked(walk), theirs)
    assert walk.outcome is not None and walk.outcome.kl_div is None
    assert walk.outcome.tokens_walked < walk.outcome.tokens_requested


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("name", MODELS)
def test_nvfp4_lane_answers_as_lm_eval_on_transformers_and_compressed_tensors(
    name: str, scheme: Any, pico: Callable[..., Path], tmp_path: Path
) -> None:
    architecture, changes = MODELS[name]
    model, output = pico(architecture, **changes), tmp_path / "out"
    fourge.quantize(str(model), output, scheme=scheme, **SETS)
    theirs = hf_model(load_quantized(output), output, max_length=MAX_LENGTH)
    require_same_answers(walked(engine(tmp_path / "alone", None, output), "quantized"), theirs)
    both = engine(tmp_path / "both", model, output)
    require_same_answers(walked(both, "quantized"), theirs)
    assert both.numerics == {"NVFP4": "W4A4 emulated", "NVFP4A16": "W4A16 emulated"}[scheme]


def greedy_requests(model: Any) -> list[ScoreRequest]:
    """Contexts with what transformers finds most likely to follow, and the same with the last token changed."""
    rng = np.random.default_rng(5)
    made = []
    for _ in range(4):
        context = rng.integers(3, 128, 6).tolist()
        follow = [*context]
        for _ in range(3):
            with torch.no_grad():
                follow.append(int(model(torch.tensor([follow])).logits[0, -1].argmax()))
        continuation = follow[6:]
        made += [score_request(context, continuation, 64), score_request(context, [*continuation[:-1], 5], 64)]
    return made


def test_greedy_continuations_are_flagged_and_others_are_not(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = pico()
    requests = greedy_requests(load_source(model))
    scores = engine(tmp_path, model).score(requests)["baseline"]
    assert [scores[request.key][1] for request in requests] == [True, False] * 4


def test_per_token_measures_are_those_of_transformers_logits(pico: Callable[..., Path], tmp_path: Path) -> None:
    """Every predicting token counts once, however many requests score it; errors are clustered by context."""
    model, output = pico(), tmp_path / "out"
    fourge.quantize(str(model), output, **SETS)
    contexts = [[4, 5, 6], [4, 5, 7, 8], [9, 10]]
    requests = [score_request(context, [token, 11], 64) for context in contexts for token in (20, 21, 22)]
    walk = engine(tmp_path, model, output)
    walk.score(requests)
    before, after = load_source(model), load_quantized(output)
    kl, agrees, clusters = [], [], []
    for number, context in enumerate(contexts):
        for ids in ([*context], *([*context, token] for token in (20, 21, 22))):
            with torch.no_grad():
                p, q = (m(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for m in (before, after))
            kl.append(float((p.exp() * (p - q)).sum()))
            agrees.append(float(p.argmax() == q.argmax()))
            clusters.append(number)
    assert walk.outcome is not None and walk.outcome.kl_div is not None and walk.outcome.top1_agreement is not None
    expected = clustered_mean(np.array(kl), np.array(clusters))
    assert walk.outcome.kl_div.tokens == 12
    assert walk.outcome.kl_div.mean == pytest.approx(expected.mean, rel=1e-4)
    assert walk.outcome.kl_div.standard_error == pytest.approx(expected.standard_error, rel=1e-3)
    assert walk.outcome.top1_agreement.mean == pytest.approx(np.mean(agrees))


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i / 4 for i in range(8)],
    "original_max_position_embeddings": 32,
}


def test_a_rotary_table_that_follows_the_length_is_that_of_the_request_alone(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    model = pico(rope_parameters=LONG_ROPE, max_position_embeddings=64)
    require_same_answers(walked(engine(tmp_path, model)), hf_model(load_source(model), model))


def test_an_fp8_kv_cache_is_walked_the_same_in_trees_and_alone(pico: Callable[..., Path], tmp_path: Path) -> None:
    outputs = {}
    for scheme in (None, "fp8"):
        outputs[scheme] = tmp_path / f"kv-{scheme}"
        fourge.quantize(str(pico()), outputs[scheme], kv_cache_scheme=scheme, **SETS)  # type: ignore[arg-type]
    asked = instances("loglikelihood", pairs())
    packed, alone, without = (
        [score for score, _ in walked(engine(tmp_path / name, None, output, **given), "quantized").loglikelihood(asked)]
        for name, output, given in (
            ("packed", outputs["fp8"], {}),
            ("alone", outputs["fp8"], {"micro_batch_tokens": 1}),
            ("without", outputs[None], {}),
        )
    )
    assert packed == pytest.approx(alone, **FP32_ROUNDING)
    assert max(abs(a - b) for a, b in zip(packed, without, strict=True)) > 1e-2


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_the_budget_changes_no_answer_beyond_rounding(budget: int, pico: Callable[..., Path], tmp_path: Path) -> None:
    walk = engine(tmp_path, pico(), micro_batch_tokens=budget)
    require_same_answers(walked(walk), hf_model(load_source(pico()), pico(), max_length=MAX_LENGTH))


def test_head_in_chunks_gives_the_same_answers(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large heads meet their rows a chunk at a time; chunks that part the pairs of one request change nothing."""
    requests = greedy_requests(load_source(pico()))
    whole = engine(tmp_path / "whole", pico()).score(requests)["baseline"]
    monkeypatch.setattr("fourge.evaluation.scoring_walk.head_chunk_rows", lambda lanes: 5)
    monkeypatch.setattr("fourge.evaluation.scoring_walk.ROWS", 2)
    chunked = engine(tmp_path / "chunked", pico()).score(requests)["baseline"]
    assert {key: found[1] for key, found in whole.items()} == {key: found[1] for key, found in chunked.items()}
    for key, (likelihood, _) in whole.items():
        assert chunked[key][0] == pytest.approx(likelihood, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 7}])
def test_text_becomes_the_tokens_of_lm_evals_hf_model(
    options: dict[str, Any], pico: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = hf_model(load_source(pico()), pico(), **options)
    walk = engine(tmp_path, pico(), max_length=None, **options)
    ours = WalkLM(walk.prompting, Recorder())
    chat = [{"role": "user", "content": "ba be"}, {"role": "assistant", "content": "bi"}]
    rendered = ours.apply_chat_template(chat)
    assert rendered == theirs.apply_chat_template(chat)
    assert ours.apply_chat_template(chat, False) == theirs.apply_chat_template(chat, False)
    for text in ("ba be bi", rendered, "<s> ba", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    if "prefix_token_id" not in options:  # lm-eval takes that token for BOS, and adds one to the template's
        assert ours.tok_encode(rendered).count(1) == 1, "BOS is there once"
    for name in ("max_length", "prefix_token_id", "eot_token_id", "tokenizer_name"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert walk.max_length == 256


def test_a_template_that_refuses_system_messages_gets_none(pico: Callable[..., Path], tmp_path: Path) -> None:
    walk = engine(tmp_path, pico())
    walk.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    chat = [{"role": "system", "content": "ba"}, {"role": "user", "content": "be"}]
    assert WalkLM(walk.prompting, Recorder()).apply_chat_template(chat) == "be"


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InputError, match="empty continuation"):
        score_request([1], [], 8)
    with pytest.raises(InputError, match="9 tokens, the model reads at most 8"):
        score_request([1], list(range(9)), 8)


def test_hidden_states_out_of_range_are_named(pico: Callable[..., Path], tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(pico(), damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layer 1: hidden states of the requests leave .* bf16 lane"):
        engine(tmp_path / "walk", damaged).score([score_request([4, 5], [6], 8)])


def test_two_models_that_are_not_one_are_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    fourge.quantize(str(pico()), tmp_path / "out", **SETS)
    with pytest.raises(InputError, match="not one model"):
        engine(tmp_path, pico(intermediate_size=128), tmp_path / "out")
    with pytest.raises(InputError, match="no quantization_config"):
        engine(tmp_path, None, pico())
    with pytest.raises(InputError, match="already quantized"):
        engine(tmp_path, tmp_path / "out", None)


def test_too_little_disk_is_refused_before_anything_is_walked(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"1.0 kB of disk are needed for hidden states, 1 B are free"):
        engine(tmp_path, pico()).score([score_request([4, 5], [6], 8)])
