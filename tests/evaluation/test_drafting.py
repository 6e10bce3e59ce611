"""Generated answers of the walk: greedy decoding by transformers token for token, whatever drafts."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import hf_model, instances, load_quantized, load_source, word_tokenizer, words
from test_walk_lm_eval import run_on, write_tasks

import fourge
from fourge.errors import InputError
from fourge.evaluation import draft_models, walk_generation
from fourge.evaluation.drafting import Answer, Draft, answer_verified
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.generation import GenerationReader
from fourge.evaluation.requests import GenerateRequest
from fourge.evaluation.walk_generation import WalkGeneration
from fourge.evaluation.walk_lm import Prompting

GREEDY: dict[str, Any] = {"do_sample": False}
Models = tuple[Path, Path]


def requests(count: int, **settings: Any) -> list[GenerateRequest]:
    """Prompts of 1 to 40 words, of which some share their beginnings."""
    rng = np.random.default_rng(5)
    shots = words(rng, 12)
    asked = [(shots + " " if i % 3 else "") + words(rng, int(rng.integers(1, 28))) for i in range(count)]
    return [GenerateRequest(text, GREEDY | settings) for text in asked]


def generation(
    models: Sequence[Path | None], folder: Path, restart: bool = False, **prompting: Any
) -> tuple[WalkGeneration, Any]:
    engine = WalkEngine(WalkSettings(*models, folder, "float32", "cpu"))
    read = Prompting(word_tokenizer(engine.lanes[0].checkpoint.directory), engine.lanes[0].config, **prompting)
    lanes = dict(zip(engine.roles, engine.lanes, strict=True))
    return WalkGeneration(lanes, read, folder, micro_batch_tokens=128, restart=restart), read


def greedy_tokens(model: Any, directory: Path, asked: Sequence[GenerateRequest], most: int) -> list[list[int]]:
    """transformers' `generate`, a prompt at a time."""
    tokenizer = word_tokenizer(directory)
    found = []
    for request in asked:
        prompt = tokenizer(request.context, return_tensors="pt").input_ids
        with torch.no_grad():
            tokens = model.generate(prompt, max_new_tokens=most, do_sample=False, pad_token_id=0)
        found.append(tokens[0, prompt.shape[1] :].tolist())
    return found


def as_instances(asked: Sequence[GenerateRequest]) -> list[Any]:
    return instances("generate_until", [(request.context, dict(request.gen_kwargs)) for request in asked])


def kept_tokens(folder: Path, role: str) -> list[list[int]]:
    stored = json.loads((folder / "generation" / f"{role}.json").read_text())
    return [[int(word) for word in text.split()] for text in stored["answers"]]


MOST = 24


@pytest.fixture(scope="module")
def asked() -> list[GenerateRequest]:
    return requests(200, max_gen_toks=MOST, until=[])


@pytest.fixture(scope="module")
def expected(models: Models, asked: list[GenerateRequest]) -> list[list[int]]:
    return greedy_tokens(load_source(models[0]), models[0], asked, MOST)


def test_200_prompts_drafted_by_the_quantized_model(
    models: Models, asked: list[GenerateRequest], expected: list[list[int]], tmp_path: Path
) -> None:
    made, _ = generation(models, tmp_path)
    texts = made.answer(asked)
    assert kept_tokens(tmp_path, "baseline") == expected
    assert len({len(tokens) for tokens in expected}) > 1, "no answer ends before the others"
    assert kept_tokens(tmp_path, "quantized") != expected
    outcome = made.outcomes["baseline"]
    assert outcome.drafted_by == "quantized" and 1 < outcome.passes < MOST
    assert outcome.mean_accepted is not None and outcome.mean_accepted > 1
    assert [text.tokens for text in texts["baseline"]] == [len(tokens) for tokens in expected]
    assert [text.truncated for text in texts["baseline"]] == [2 not in tokens for tokens in expected]
    assert not list((tmp_path / "generation").glob("*-pass-*"))


def test_the_quantized_models_own_answers(models: Models, asked: list[GenerateRequest], tmp_path: Path) -> None:
    """One at a time the bits are transformers', and all answers; in batches a rounding step here and there takes an
    activation over the edge between two FP4 values, as it does in any engine that quantizes them."""
    few = asked[:32]
    theirs = greedy_tokens(load_quantized(models[1]), models[1], few, MOST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_models, "_MOST_ROWS", 1)
        generation((None, models[1]), tmp_path / "alone")[0].answer(few)
    assert kept_tokens(tmp_path / "alone", "quantized") == theirs
    generation((None, models[1]), tmp_path / "batched")[0].answer(few)
    same = [a == b for a, b in zip(kept_tokens(tmp_path / "batched", "quantized"), theirs, strict=True)]
    assert np.mean(same) > 0.9


def test_a_model_alone_drafts_for_itself_in_one_pass(
    models: Models, asked: list[GenerateRequest], expected: list[list[int]], tmp_path: Path
) -> None:
    made, _ = generation((models[0], None), tmp_path)
    made.answer(asked)
    assert kept_tokens(tmp_path, "baseline") == expected
    assert made.outcomes["baseline"].passes == 1 and made.outcomes["baseline"].drafted_by == "baseline"


def test_a_bad_draft_model_costs_passes_and_no_token(
    models: Models, asked: list[GenerateRequest], expected: list[list[int]], tmp_path: Path
) -> None:
    """Random weights of the same shape draft: what they guess is right as seldom as chance has it."""
    from safetensors.torch import load_file, save_file

    stranger = shutil.copytree(models[0], tmp_path / "stranger")
    torch.manual_seed(99)
    weights = {name: torch.randn_like(w) * 0.15 for name, w in load_file(stranger / "model.safetensors").items()}
    save_file(weights, stranger / "model.safetensors", metadata={"format": "pt"})
    sets: dict[str, Any] = {"num_calibration_samples": 4, "num_probe_samples": 0, "max_seq_length": 24}
    fourge.quantize(str(stranger), tmp_path / "bad", calibration="random", method="max", threads=1, **sets)
    made, _ = generation((models[0], tmp_path / "bad"), tmp_path / "evaluation")
    made.answer(asked)
    assert kept_tokens(tmp_path / "evaluation", "baseline") == expected
    outcome = made.outcomes["baseline"]
    assert outcome.drafted_by == "quantized" and outcome.mean_accepted is not None
    assert outcome.mean_accepted < 0.5 and MOST / 2 < outcome.passes <= MOST


def random_draft(answers: Sequence[Answer]) -> list[list[int]]:
    rng = np.random.default_rng(sum(len(answer.tokens) for answer in answers))
    return [rng.integers(3, 128, int(rng.integers(0, 60))).tolist() for _ in answers]


def no_draft(answers: Sequence[Answer]) -> list[list[int]]:
    return [[] for _ in answers]


@pytest.mark.parametrize("draft", [random_draft, no_draft])
def test_a_bad_draft_costs_passes_and_no_token(
    draft: Draft,
    models: Models,
    asked: list[GenerateRequest],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walk_generation, "draft_with", lambda *_: draft)
    made, _ = generation((models[0], None), tmp_path)
    few = slice(0, 200, 5)
    made.answer(asked[few])
    assert kept_tokens(tmp_path, "baseline") == expected[few]
    longest = max(len(tokens) for tokens in expected[few])
    assert longest / 2 < made.outcomes["baseline"].passes <= longest


@pytest.mark.parametrize("free", [10**6, 600 * 10**6])
def test_models_that_do_not_fit_are_walked(
    free: int,
    models: Models,
    asked: list[GenerateRequest],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without memory drafts are looked up, with little the weights stay as they are stored."""
    monkeypatch.setattr(draft_models, "free_memory", lambda _: free)
    monkeypatch.setattr(draft_models, "_WORKING_BYTES", 600 * 10**6 - 250_000)
    made, _ = generation(models, tmp_path)
    few = slice(0, 200, 20)
    made.answer(asked[few])
    assert kept_tokens(tmp_path, "baseline") == expected[few]
    quantized = greedy_tokens(load_quantized(models[1]), models[1], asked[few], MOST)
    assert kept_tokens(tmp_path, "quantized") == quantized
    by = {role: outcome.drafted_by for role, outcome in made.outcomes.items()}
    said = capsys.readouterr().err
    if free < 10**7:
        assert by == {"baseline": "look-up", "quantized": "look-up"}
        assert "cannot draft in memory (599.9 MB of memory are needed, 1.0 MB are there)" in said
    else:
        assert by == {"baseline": "quantized", "quantized": "itself"}
        assert made._fit.form == "stored"


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral"])
def test_other_architectures(architecture: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    """Biases, norms of queries and keys, a window that slides past the prompt."""
    window = {"sliding_window": 8} if architecture == "mistral" else {}
    model = pico(architecture, **window)
    some = requests(12, max_gen_toks=12)
    made, _ = generation((model, None), tmp_path)
    made.answer(some)
    assert kept_tokens(tmp_path, "baseline") == greedy_tokens(load_source(model), model, some, 12)
    assert made.outcomes["baseline"].passes == 1


SETTINGS: dict[str, dict[str, Any]] = {
    "a stop string": {"until": ["w3", "w5", "w7"], "max_gen_toks": 30},
    "one of two words": {"until": ["w20 w2", "ba"], "max_gen_toks": 30},
    "a string alone": {"until": "w1", "max_gen_toks": 12},
    "no limit said": {"until": ["</s>"]},
    "a context cut short": {"max_gen_toks": 250},
    "another name of the limit": {"max_new_tokens": 5, "temperature": 0.0},
    "special tokens": {"until": ["<user>"], "max_gen_toks": 40},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("bos", [None, False])
def test_strings_are_those_of_lm_evals_hf_model(case: str, bos: bool | None, models: Models, tmp_path: Path) -> None:
    plain = requests(5, **SETTINGS[case])
    some = [*plain, GenerateRequest("<s><user> ba be </s>", plain[0].gen_kwargs)]
    made, _ = generation((models[0], None), tmp_path, max_length=270, add_bos_token=bos)
    lm = hf_model(load_source(models[0]), models[0], max_length=270, add_bos_token=bos)
    theirs = lm.generate_until(as_instances(some), disable_tqdm=True)
    assert [text.text for text in made.answer(some)["baseline"]] == theirs


def test_thoughts_are_cut_off_as_lm_eval_does(models: Models, tmp_path: Path) -> None:
    _, prompting = generation((models[0], None), tmp_path, chat_template_args={"thinking": True})
    assert prompting.chat_template_args
    reader = GenerationReader(prompting, models[0])
    question = reader.question(GenerateRequest("ba", {"max_gen_toks": 4, "until": ["stop"]}))
    reader._tokenizer = type("Says", (), {"decode": lambda *_, **__: "a stop </think> b c stop d"})()
    assert reader.text(question, [1]) == "b c "


@pytest.fixture(scope="module")
def never_stopped(models: Models, asked: list[GenerateRequest], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made, _ = generation(models, tmp_path_factory.mktemp("whole"))
    return made.answer(asked[:8]), made.outcomes


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("stop_at", [1, 2, 4, 7, 12, 30])
def test_stopped_anywhere_it_goes_on_to_the_same_answers(
    stop_at: int,
    models: Models,
    asked: list[GenerateRequest],
    expected: list[list[int]],
    never_stopped: Any,
    tmp_path: Path,
) -> None:
    """Stopped just before a file is replaced: the journal, or what a verifying walk commits."""
    from fourge.checkpoint import durable
    from fourge.walk import walk_folder

    calls = [0]
    original = durable.replace_durably

    def stopping(temporary: Path, final: Path) -> None:
        calls[0] += 1
        if calls[0] == stop_at:
            raise Killed
        original(temporary, final)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(durable, "replace_durably", stopping)
        patch.setattr(walk_folder, "replace_durably", stopping)
        generation(models, tmp_path)[0].answer(asked[:8])
    made, _ = generation(models, tmp_path)
    assert (made.answer(asked[:8]), made.outcomes) == never_stopped
    assert kept_tokens(tmp_path, "baseline") == expected[:8]


def test_finished_answers_are_not_made_again_and_others_are_refused(
    models: Models, asked: list[GenerateRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generation(models, tmp_path)[0].answer(asked[:5])

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("it was made again")

    monkeypatch.setattr(walk_generation, "ResidentModel", nothing)
    monkeypatch.setattr(walk_generation, "ScoringWalk", nothing)
    assert generation(models, tmp_path)[0].answer(asked[:5]) == first
    with pytest.raises(InputError, match=r"begun with other requests .*--restart starts over"):
        generation(models, tmp_path)[0].answer(asked[:4])
    monkeypatch.undo()
    assert len(generation(models, tmp_path, restart=True)[0].answer(asked[:4])["baseline"]) == 4
    (tmp_path / "generation" / "quantized.json").write_text("{")
    with pytest.raises(InputError, match=r"quantized\.json is damaged"):
        generation(models, tmp_path)[0].answer(asked[:4])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sampling": ({"do_sample": True, "temperature": 0.6}, r"samples its answers .*--gen-kwargs do_sample=false"),
    "temperature alone": ({"temperature": 0.6}, "samples its answers"),
    "a penalty": ({"repetition_penalty": 1.1}, r"repetition_penalty = 1\.1 takes other tokens"),
    "beams": ({"num_beams": 4}, "num_beams = 4 takes other tokens"),
    "unknown": ({"watermark": 3}, "watermark = 3, which the walk does not know"),
    "too long": ({"max_gen_toks": 300}, "generates 300 tokens, and the model reads at most 256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_greedy_is_refused_before_anything(case: str, models: Models, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        generation(models, tmp_path / "evaluation")[0].answer([GenerateRequest("ba", settings)])
    assert not (tmp_path / "evaluation").exists()


def test_a_checkpoint_that_penalises_repetition_is_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    """As Qwen2.5's generation_config.json does; transformers applies it to greedy decoding too."""
    import shutil

    model = shutil.copytree(pico(), tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05, "eos_token_id": [2, 40]}))
    made, _ = generation((model, None), tmp_path / "evaluation")
    with pytest.raises(InputError, match=r"generation_config\.json: repetition_penalty = 1\.05"):
        made.answer(requests(2, max_gen_toks=6))
    some = requests(20, max_gen_toks=20, repetition_penalty=1.0)
    found = [text.tokens for text in made.answer(some)["baseline"]]
    lm = hf_model(load_source(model), model)
    theirs = lm.generate_until(as_instances(some), disable_tqdm=True)
    assert [text.text for text in made.answer(some)["baseline"]] == theirs
    assert min(found) < 20


def test_the_loop_keeps_what_agrees_and_the_models_token(models: Models) -> None:
    """By hand: the model says 10, 11, 12, …; drafts are right for two tokens, then wrong."""
    read = generation((models[0], None), Path("unused"))[1]
    question = GenerationReader(read, models[0]).question(GenerateRequest("ba", {"max_gen_toks": 7}))
    answer = Answer(question)
    journal = type("Kept", (), {"state": walk_generation.DraftState(1, 1), "save": lambda *_: None})()
    start = len(question.prompt)

    def verify(_: int, prefixes: Any, drafts: Any) -> list[list[int]]:
        return [[10 + len(prefixes[0]) - start + i for i in range(len(drafts[0]) + 1)]]

    answer_verified([answer], lambda _: [[10 + len(answer.tokens), 11 + len(answer.tokens), 3, 3]], verify, journal)
    assert answer.tokens == [10, 11, 12, 13, 14, 15, 16] and answer.truncated
    assert (journal.state.passes, journal.state.accepted) == (3, 4)


GSM8K_LIKE: dict[str, Any] = {
    "output_type": "generate_until",
    "num_fewshot": 2,
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["w3", "</s>"], "do_sample": False, "max_gen_toks": 12},
    "filter_list": [{"name": "flexible", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("chat", [False, True])
def test_lm_evals_samples_are_those_of_its_hf_model(
    chat: bool, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_models, "_MOST_ROWS", 1)
    (tmp_path / "tasks").mkdir()
    run = run_on(
        write_tasks(tmp_path / "tasks", {"tiny_gsm8k": GSM8K_LIKE}), apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    engine = WalkEngine(WalkSettings(*models, tmp_path / "walk", "float32", "cpu"))
    ours = engine.evaluate(run)
    for role, directory, load in (("baseline", models[0], load_source), ("quantized", models[1], load_quantized)):
        theirs = run(hf_model(load(directory), directory))
        assert ours[role]["results"] == theirs["results"]
        for mine, other in zip(ours[role]["samples"]["tiny_gsm8k"], theirs["samples"]["tiny_gsm8k"], strict=True):
            assert mine["resps"] == other["resps"] and mine["filtered_resps"] == other["filtered_resps"]
            assert 1 <= mine["generated_tokens"][0] <= 12
            assert mine["truncated"][0] <= (mine["generated_tokens"][0] == 12)
    assert engine.outcome is not None and engine.outcome.bytes_read > 0
