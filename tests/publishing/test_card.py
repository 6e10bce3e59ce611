"""`fourge card`: everything that the published card tells, nothing that no file tells, and the owner's own words."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_directories import SCORES, SOURCE_CARD, change, estimate, evaluation, write, write_405b
from finished import failed, quantize
from huggingface_hub import ModelCard, ModelCardData, metadata_eval_result
from typer.testing import CliRunner

import fourge
from fourge.cli import app
from fourge.progress import format_bytes

EVALUATION = ".fourge/evaluate/openllm-v1/evaluation.json"


@pytest.fixture
def hermes(tmp_path: Path) -> Path:
    return write_405b(tmp_path / "Hermes-4-405B-NVFP4")


def card_text(output: Path, **options: Any) -> str:
    fourge.card(output, **options)
    return (output / "README.md").read_text()


def row(text: str, name: str) -> list[str]:
    """The cells of the table's row that begins with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# What the published Hermes-4-405B-NVFP4 card tells, as facts

PUBLISHED_FACTS = {
    "base model": r"\[NousResearch/Hermes-4-405B\]\(https://huggingface.co/NousResearch/Hermes-4-405B\)",
    "parameters": r"405\.85 B",
    "architecture": r"LlamaForCausalLM: 126 layers",
    "scheme": r"NVFP4 \(W4A4\)",
    "recipe": r"max calibration",
    "calibration set": r"HuggingFaceH4/ultrachat_200k",
    "samples": r"512 samples of at most 2,048 tokens",
    "tokens": r"1,048,576 tokens",
    "head left": r"Left unquantized\*\* \| `lm_head`",
    "format": r"compressed-tensors · nvfp4-pack-quantized",
    "size": r"234\.3 GB = 218\.2 GiB",
    "source's size": r"811\.7 GB",
    "vLLM on two B200": r"on 2 × B200 or larger:\n\n```bash\nvllm serve Nous/Hermes.* --tensor-parallel-size 2",
    "weight-only on A100s": r"on 4 × A100 or larger:\n\n```bash\nvllm serve .*--tensor-parallel-size 4",
    "chat template": r"model's own chat template is applied:\n\n```python\n(.*\n)*.*llm\.chat\(",
    "weight-only on older GPUs": r"\| H100 \| 8 \| W4A16, weight-only \(Marlin\)",
    "harness": r"lm-evaluation-harness",
    "context": r"131,072 tokens",
    "licence": r"\[llama3\]\(https://example.org/licence\)",
    "licence file": r"\[LICENSE\]\(LICENSE\)",
    "reproduction": r"fourge quantize NousResearch/Hermes-4-405B --output Hermes-4-405B-NVFP4 .*--method max",
    "revision": r"revision `0123abcd`(.*\n)*.*--revision 0123abcd",
    "evaluation's command": r"fourge evaluate OUT --baseline NousResearch/Hermes-4-405B --suite openllm-v1",
    "versions": r"torch 2\.13\.0, transformers 5\.23\.0",
    "citation": r"@misc\{Hermes_4_405B_NVFP4",
    **{
        task: rf"\| {task} \| {shots if shots is not None else 5} \| {metric}.* \| {items:,} \|.* {100 * score:.2f} ± "
        for task, (metric, _, shots, items, score) in SCORES.items()
    },
}


def test_everything_that_the_published_card_tells(hermes: Path) -> None:
    text = card_text(hermes, quantized_by="Nous")
    untold = [fact for fact, pattern in PUBLISHED_FACTS.items() if not re.search(pattern, text)]
    assert untold == []


def test_both_columns_recovery_and_errors(hermes: Path) -> None:
    cells = row(card_text(hermes), "gsm8k")
    assert cells == [
        *("gsm8k", "5", "exact_match (strict-match)", "1,319", "92.99 ± 1.00", "92.49 ± 1.00"),
        *("-0.50 ± 0.21", "99.46 ± 0.26", "17", "11"),
    ]


# Metadata


def test_metadata_is_the_hubs(hermes: Path) -> None:
    card_text(hermes, quantized_by="Nous")
    data = ModelCard.load(hermes / "README.md").data
    assert isinstance(data, ModelCardData)
    assert data.base_model == "NousResearch/Hermes-4-405B"
    assert data.base_model_relation == "quantized"  # type: ignore[attr-defined]
    assert data.quantized_by == "Nous"  # type: ignore[attr-defined]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.license_link, data.language) == ("llama3", "https://example.org/licence", ["en"])
    assert data.datasets == ["HuggingFaceH4/ultrachat_200k"]
    assert {"nvfp4", "compressed-tensors", "vllm", "llama", "chat", "reasoning"} <= set(data.tags or [])


def test_scores_are_in_the_hubs_own_form(hermes: Path) -> None:
    card_text(hermes)
    data = ModelCard.load(hermes / "README.md").data
    found = {result.dataset_name: result for result in data.eval_results}
    assert {task: result.metric_value for task, result in found.items()} == {t: s[-1] for t, s in SCORES.items()}
    assert found["mmlu"].metric_args == {"num_fewshot": 5}
    again = metadata_eval_result(
        model_pretty_name="Hermes-4-405B-NVFP4",
        task_pretty_name="Text Generation",
        task_id="text-generation",
        metrics_pretty_name="exact_match (strict-match)",
        metrics_id="exact_match",
        metrics_value=0.9249,
        dataset_pretty_name="gsm8k",
        dataset_id="gsm8k",
    )
    theirs, ours = again["model-index"][0], data.to_dict()["model-index"][0]
    (their_result,) = theirs["results"]
    our_result = next(result for result in ours["results"] if result["dataset"]["name"] == "gsm8k")
    assert (ours["name"], our_result["task"], our_result["dataset"]) == (
        *(theirs["name"], their_result["task"], their_result["dataset"]),
    )
    kept = ("type", "name", "value")
    assert [our_result["metrics"][0][key] for key in kept] == [their_result["metrics"][0][key] for key in kept]


def test_both_thinking_modes_are_shown(hermes: Path) -> None:
    """`--thinking both` keeps each in a folder of its own."""
    for mode in ("on", "off"):
        content = evaluation() | {"suite": None, "settings": evaluation()["settings"] | {"thinking": mode}}
        write(hermes / f".fourge/evaluate/my_task/thinking-{mode}/evaluation.json", content)
    write(hermes / ".fourge/evaluate/my_task/walk/evaluation.json", {"not": "ours"})
    text = card_text(hermes)
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    for title in ("openllm-v1", "my_task, thinking off", "my_task, thinking on"):
        assert titles.count(f"### {title}") == 1
    assert ".fourge/evaluate/my_task/thinking-on/evaluation.json" in text


def test_part_of_a_suite_is_named_as_part(hermes: Path) -> None:
    tasks = evaluation()["tasks"]
    change(hermes / EVALUATION, ("tasks",), tasks[:2])
    assert "\n### openllm-v1 (2 of its 6 tasks)\n" in card_text(hermes)


def test_the_datasets_id_is_from_lm_evals_results(hermes: Path) -> None:
    configs = {
        "gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main"},
        "winogrande": {"dataset_path": "/somewhere/winogrande"},
    }
    write(hermes / ".fourge/evaluate/openllm-v1/quantized/results.json", {"configs": configs})
    card_text(hermes)
    found = {result.dataset_name: result for result in ModelCard.load(hermes / "README.md").data.eval_results}
    assert (found["gsm8k"].dataset_type, found["gsm8k"].dataset_config) == ("openai/gsm8k", "main")
    assert found["winogrande"].dataset_type == "winogrande"


def test_the_score_of_some_items_is_not_published_as_the_tasks(hermes: Path) -> None:
    folder = hermes / ".fourge/evaluate/openllm-v1"
    results = {
        "configs": {"gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}},
        "n-samples": {
            "gsm8k": {"original": 1319, "effective": 24},
            "winogrande": {"original": 1267, "effective": 1267},
            "mmlu_anatomy": {"original": 135, "effective": 2},
            "mmlu_virology": {"original": 166, "effective": 2},
        },
        "group_subtasks": {"mmlu": ["mmlu_other"], "mmlu_other": ["mmlu_anatomy", "mmlu_virology"]},
    }
    write(folder / "quantized/results.json", results)
    change(hermes / EVALUATION, ("tasks", 1, "items"), 24)
    text = card_text(hermes)
    found = {result.dataset_name: result for result in ModelCard.load(hermes / "README.md").data.eval_results}
    gsm8k = found["gsm8k (24 of 1,319 items)"]
    assert (gsm8k.dataset_type, gsm8k.dataset_config, gsm8k.dataset_split) == ("openai/gsm8k", "main", "test[:24]")
    assert gsm8k.metric_args == {"num_fewshot": 5, "num_samples": 24}
    assert found["mmlu (4 of 301 items)"].metric_args == {"num_fewshot": 5, "num_samples": 4}
    assert {"winogrande", "hellaswag"} <= found.keys()
    assert row(text, "gsm8k")[3] == "24 of 1,319"
    change(hermes / EVALUATION, ("settings", "limit"), 100)
    card_text(hermes)
    names = {result.dataset_name for result in ModelCard.load(hermes / "README.md").data.eval_results}
    assert {"hellaswag (not all items)", "winogrande"} <= names


def test_a_task_at_chance_has_no_recovery_and_its_note_is_said_once(hermes: Path) -> None:
    note = "the baseline is not above chance (25.0%)"
    for number in (0, 5):
        change(hermes / EVALUATION, ("tasks", number, "at_chance"), True)
        change(hermes / EVALUATION, ("tasks", number, "note"), note)
    mean = {"tasks": 6, "items": 28659, **{key: evaluation()["tasks"][0][key] for key in ("baseline", "quantized")}}
    change(hermes / EVALUATION, ("macro",), mean | {"delta": None, "recovery": {"value": 0.9, "se": 0.01}})
    text = card_text(hermes)
    assert [row(text, task)[7] for task in ("arc_challenge", "winogrande", "gsm8k")] == ["–", "–", "99.46 ± 0.26"]
    assert f"- arc_challenge, winogrande: {note}.\n" in text and text.count(note) == 1
    assert row(text, "mean of tasks (6)")[7] == "90.00 ± 1.00"
    for number in range(6):
        change(hermes / EVALUATION, ("tasks", number, "at_chance"), True)
    assert row(card_text(hermes), "mean of tasks (6)")[7] == "–"


# Nothing that no file tells

CHANGES: dict[str, tuple[str, tuple[Any, ...], Any, str, str]] = {
    "score": (EVALUATION, ("tasks", 1, "quantized", "score"), 0.1234, "92.49 ±", "12.34 ±"),
    "recovery": (EVALUATION, ("tasks", 1, "recovery", "value"), 0.4321, "99.46 ±", "43.21 ±"),
    "flips": (EVALUATION, ("tasks", 5, "only_baseline"), 98765, "", "98765"),
    "KL": ("fourge.json", ("fidelity", "kl_div"), estimate(0.7654), "0.0432", "0.7654"),
    "tokens": ("fourge.json", ("data", "calibration", "tokens"), 777_777, "1,048,576", "777,777"),
    "samples": ("fourge.json", ("data", "calibration", "sequences"), 333, "512 samples", "333 samples"),
    "version": ("fourge.json", ("versions", "torch"), "9.9.9", "torch 2.13.0", "torch 9.9.9"),
    "layers": ("config.json", ("num_hidden_layers",), 63, "126 layers", "63 layers"),
    "context": ("config.json", ("max_position_embeddings",), 4096, "131,072", "4,096 tokens"),
    "source's size": (
        "fourge.json",
        ("source", "files", "model-00001-of-00001.safetensors", "size"),
        10**9,
        "811.7",
        "1.0 GB",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_figure_follows_its_file(hermes: Path, name: str) -> None:
    file, keys, value, before, after = CHANGES[name]
    text = card_text(hermes)
    assert before in text and after not in text
    change(hermes / file, keys, value)
    text = card_text(hermes)
    assert after in text and (not before or before not in text)


def test_every_section_with_figures_names_its_file(hermes: Path) -> None:
    text = card_text(hermes)
    closing = text.partition("## Where the figures come from")[2]
    for section, file in {
        "Overview": "config.json",
        "Hardware": "config.json",
        "Evaluation": EVALUATION,
        "Fidelity": "fourge.json",
        "Quantization details": "fourge.json",
    }.items():
        assert re.search(rf"\| {section} \|[^\n]*{re.escape(file)}", closing)


def test_what_is_missing_is_said(hermes: Path) -> None:
    shutil.rmtree(hermes / ".fourge")
    for name in ("fourge.json", "README.md", "LICENSE", "chat_template.jinja"):
        (hermes / name).unlink()
    result = fourge.card(hermes)
    text = result.card.read_text()
    assert set(result.missing) == {"Evaluation", "Fidelity", "Error layer by layer", "Quantization details"}
    assert "fourge evaluate OUT --baseline BASE --suite openllm-v1" in text
    assert "No file here says how it was made" in text
    assert "not known: there is no card of the source" in text
    assert "--base-model ORG/NAME" in text
    assert "±" not in text and "llm.generate(" in text
    data = ModelCard.load(hermes / "README.md").data.to_dict()
    assert not data.keys() & {"license", "base_model", "base_model_relation", "model-index", "datasets"}


def test_limitations_are_facts(hermes: Path) -> None:
    change(hermes / EVALUATION, ("tasks", 5, "at_chance"), True)
    change(hermes / EVALUATION, ("tasks", 0, "holm_p"), 0.001)
    change(hermes / EVALUATION, ("tasks", 1, "task"), "my_own_task")
    change(hermes / EVALUATION, ("settings", "limit"), 100)
    change(hermes / EVALUATION, ("contamination",), {"checked_against": None, "not_checked": "why", "items": {}})
    limits = card_text(hermes).partition("## Limitations")[2].partition("\n## ")[0]
    assert "at chance on winogrande" in limits
    assert "(Holm's p below 0.05): arc_challenge." in limits
    assert "tasks that cards usually report: gsm8k." in limits
    assert "the first 100 items" in limits
    assert "openllm-v1: not checked against the calibration set" in limits
    assert "longer than 2,048 tokens was calibrated or probed, of a context of 131,072" in limits


# The owner's own


def test_the_owners_text_survives(hermes: Path) -> None:
    text = card_text(hermes)
    text = text.replace(
        "<!-- owner:begin introduction -->\n", "<!-- owner:begin introduction -->\nOur **own** {{ words }}\n"
    )
    text = text.replace(
        "## Citation\n", "## Citation\n\n<!-- owner:begin thesis -->\nCite my thesis.\n<!-- owner:end -->\n"
    )
    (hermes / "README.md").write_text(text)
    result = fourge.card(hermes)
    once = result.card.read_text()
    assert result.owner_texts == ("introduction", "thesis")
    assert "Our **own** {{ words }}" in once.partition("## Overview")[0]
    assert "Cite my thesis." in once.partition("## Citation")[2].partition("\n## ")[0]
    assert card_text(hermes) == once


def test_owners_markers_that_do_not_close_are_named(hermes: Path) -> None:
    text = card_text(hermes)
    (hermes / "README.md").write_text(text.replace("<!-- owner:end -->", "", 1))
    with pytest.raises(fourge.InputError, match="'introduction' is not closed"):
        fourge.card(hermes)
    (hermes / "README.md").write_text(text + "<!-- owner:begin usage -->\n<!-- owner:end -->\n")
    with pytest.raises(fourge.InputError, match="two of the owner's texts are named 'usage'"):
        fourge.card(hermes)


def test_the_sources_card_is_kept_and_read_again(hermes: Path) -> None:
    first = card_text(hermes, base_model="NousResearch/Hermes-4", quantized_by="Nous")
    assert (hermes / ".fourge/source_card.md").read_text() == SOURCE_CARD
    shutil.rmtree(hermes / ".fourge")
    change(hermes / "fourge.json", ("source", "repository"), None)
    data = ModelCard.load(hermes / "README.md").data.to_dict()
    card_text(hermes)
    again = ModelCard.load(hermes / "README.md").data.to_dict()
    kept = ("license", "license_link", "language", "base_model", "quantized_by", "tags")
    assert {key: again[key] for key in kept} == {key: data[key] for key in kept}
    assert "base_model: NousResearch/Hermes-4\n" in first


def test_a_template_of_ones_own(hermes: Path, tmp_path: Path) -> None:
    template = tmp_path / "house.md.jinja"
    template.write_text("# House of {{ name }}\n\n{{ overview.body }}\n\n{{ owner('legal') }}\n")
    text = card_text(hermes, template=template)
    assert "# House of Hermes-4-405B-NVFP4" in text and "405.85 B" in text and "## Hardware" not in text
    assert ModelCard(text).data.to_dict()["base_model"] == "NousResearch/Hermes-4-405B"
    template.write_text("{{ overwiev }}")
    with pytest.raises(fourge.InputError, match=r"--template: 'overwiev' is undefined; the names .* overview"):
        fourge.card(hermes, template=template)


def test_a_signature_is_not_broken_in_silence(hermes: Path) -> None:
    text = card_text(hermes)
    (hermes / "model.sig").write_text("a signature")
    assert card_text(hermes) == text
    change(hermes / "fourge.json", ("settings", "seed"), 43)
    with pytest.raises(fourge.InputError, match=r"model\.sig would no longer hold"):
        fourge.card(hermes)
    assert (hermes / "README.md").read_text() == text


# Scores from elsewhere


def test_a_reference_stands_beside_ours(hermes: Path, tmp_path: Path) -> None:
    told = {"metric": "exact_match", "filter": "strict-match", "num_fewshot": 5}
    reference = {
        "name": "Elsewhere",
        "source": "https://example.org/card",
        "settings": {"apply_chat_template": True, "fewshot_as_multiturn": True},
        "scores": {"gsm8k": {"score": 0.93, **told}, "mmlu": {"score": 0.872, "metric": "acc", "filter": "none"}},
    }
    write(tmp_path / "elsewhere.json", reference)
    text = card_text(hermes, reference=[tmp_path / "elsewhere.json"])
    assert row(text, "gsm8k")[-1] == "93.00"
    assert row(text, "mmlu")[-1] == "87.20 (not comparable)"
    assert row(text, "winogrande")[-1] == "–"
    assert "https://example.org/card" in text
    assert "Elsewhere, mmlu: not comparable (num_fewshot: not told, here 5)." in text
    change(tmp_path / "elsewhere.json", ("settings", "apply_chat_template"), False)
    assert row(card_text(hermes, reference=[tmp_path / "elsewhere.json"]), "gsm8k")[-1] == "93.00 (not comparable)"


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "x"',
        "[]",
        '{"name": "x", "scores": {}}',
        '{"name": "x", "source": "y", "scores": {"gsm8k": {"score": 92}}}',
    ],
)
def test_a_bad_reference_is_refused(hermes: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(fourge.InputError, match=r"bad\.json"):
        fourge.card(hermes, reference=[tmp_path / "bad.json"])


# A checkpoint that was really quantized


@pytest.fixture(scope="module")
def quantized(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source with a card, and what was made of it."""
    folder = tmp_path_factory.mktemp("card")
    source = Path(shutil.copytree(pico("llama"), folder / "source"))
    (source / "README.md").write_text(SOURCE_CARD)
    return source, quantize(source, folder / "pico-NVFP4")


@pytest.fixture
def finished(quantized: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized[1], tmp_path / "pico-NVFP4"))


def test_whose_word_the_base_model_is(finished: Path) -> None:
    text = card_text(finished, base_model="someone/pico")
    said = "as its owner says of the local copy `source`; the digests of its files are in `fourge.json`"
    assert f"[someone/pico](https://huggingface.co/someone/pico), {said} |" in text
    assert "fourge quantize source --output pico-NVFP4" in text, "the repository's files may be others"


def test_verify_passes_with_the_card_there(quantized: tuple[Path, Path], finished: Path) -> None:
    result = fourge.card(finished, base_model="someone/pico")
    assert result.card.read_text() != SOURCE_CARD
    assert result.picture is not None and result.picture.read_bytes().startswith(b"\x89PNG")
    assert failed(finished, source=str(quantized[0])) == {}


def test_a_real_jobs_figures(finished: Path) -> None:
    text = card_text(finished)
    size = sum(path.stat().st_size for path in finished.glob("*.safetensors"))
    fidelity = json.loads((finished / ".fourge/job.json").read_text())["result"]["fidelity"]
    steps = [json.loads(line) for line in (finished / ".fourge/metrics.jsonl").read_text().splitlines()]
    seconds = sum(step["seconds"] for step in steps)
    assert f"{size:,} bytes" in text
    assert "before them; 14 Linears another way, as recorded below; input scales" in text
    assert "weighted search instead (8 ×)" in text
    assert "**Calibration set** | random tokens" in text and "held-out tokens of random tokens" in text
    assert row(text, "Perplexity, this model")[1].startswith(f"{fidelity['perplexity_nvfp4']['mean']:,.3f}")
    cpu = sum(step["cpu_seconds"] for step in steps)
    assert f"**Time** | {round(seconds)}s ({round(cpu)}s of CPU time) for 4 steps" in text
    last = steps[-1]
    assert f"**Peak memory** | {format_bytes(last['peak_resident_bytes'])} resident" in text
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    machine = f"{cpu.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} logical CPU"
    assert machine in text and "GiB of memory; computed on cpu with 1 thread in float32" in text
    assert socket.gethostname() not in text
    assert "![Errors of weights and hidden states by layer](layer_errors.png)" in text


def test_without_matplotlib_there_is_a_table(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("fourge.publishing.card_errors.find_spec", lambda name: None)
    result = fourge.card(finished)
    text = result.card.read_text()
    job = json.loads((finished / ".fourge/job.json").read_text())
    errors = [linear["weight_error"] for linear in job["steps"][1]["measures"]["linears"].values()]
    assert result.picture is None and "pip install 'fourge[card]'" in text
    assert row(text, "0")[2].startswith(f"{max(errors):.4f}")


def test_the_command_line(finished: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["card", str(finished), "--quantized-by", "someone", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["card"] == str(finished / "README.md")
    done = CliRunner().invoke(app, ["card", str(finished)])
    assert "not shown    Evaluation" in done.stdout
    assert "vllm serve someone/pico-NVFP4" in (finished / "README.md").read_text()
    with_materials = CliRunner().invoke(app, ["card", str(finished), "--base-model", "someone/pico", "--sbom"])
    assert f"{finished / 'fourge.cdx.json'}" in with_materials.stdout and (finished / "fourge.cdx.json").is_file()
    assert CliRunner().invoke(app, ["card", str(tmp_path / "nowhere")]).exit_code == 2
    assert CliRunner().invoke(app, ["card", str(finished), "--base-model", "no repository"]).exit_code == 2
