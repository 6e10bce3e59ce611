"""The main job on a small real model, end to end: fetch, quantize, verify, and let both models speak."""

import argparse
import shutil
import time
from pathlib import Path

from smollm2 import fetch

import fourge
from fourge.report.text import quantize_summary, verify_summary

BUILD = Path(__file__).resolve().parents[1] / "build" / "demo"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
)


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
    began = time.monotonic()
    source = fetch(BUILD / "SmolLM2-135M-Instruct")
    output = BUILD / ("SmolLM2-135M-Instruct-NVFP4" + ("-quick" if quick else ""))
    shutil.rmtree(output, ignore_errors=True)

    samples, probes, length = (8, 4, 128) if quick else (32, 32, 256)
    result = fourge.quantize(
        str(source),
        output,
        calibration="self",
        num_calibration_samples=samples,
        num_probe_samples=probes,
        max_seq_length=length,
    )
    report = fourge.verify(output, source=str(source))
    print("\nBoth models speak (greedy, transformers):", flush=True)
    new_tokens = 16 if quick else 48
    for prompt, before, after in zip(PROMPTS, speak(source, new_tokens), speak(output, new_tokens), strict=True):
        print(f"\n  > {prompt}\n  BF16   {before}\n  NVFP4  {after}")
    print("\n" + verify_summary(report))
    print("\n" + quantize_summary(result))
    print(f"\nThe demo took {time.monotonic() - began:.0f} s. The checkpoint: {output.relative_to(Path.cwd())}")
    if not report.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
