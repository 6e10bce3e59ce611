"""How far a quantized checkpoint is from its source on held-out tokens, measured without any of our own code.

    python fidelity_eval.py SOURCE QUANTIZED TOKENS.safetensors [--cache DIRECTORY] [--device cuda]

Loads both by transformers, the quantized one through compressed-tensors, and computes in FP32 (TF32 off), the measures
in FP64: with inputs quantized as the checkpoint says (W4A4), and with inputs left alone (W4A16). Prints one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
GROUP = 16
ROWS_AT_ONCE = 128
"""Rows of logits in FP64 at a time: 128 of a vocabulary of 150,000 are 155 MB."""


def read_probe(path: Path) -> list[Tensor]:
    """The probe sequences of a job's `tokens.safetensors`, int64 `[length]` each."""
    stored = load_file(path)
    ends = np.cumsum(stored["probe.lengths"])
    return [torch.from_numpy(part).long() for part in np.split(stored["probe.tokens"], ends[:-1])]


def decode(packed: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """FP32 `[N, K]` from codes `[N, K/2]` (low half first), group scales `[N, K/16]` and their divisor `[1]`."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return E2M1.to(packed.device)[codes.int()] * (scale.float() / global_scale.float()).repeat_interleave(GROUP, dim=1)


def load_source(directory: str, device: str) -> Any:
    """The source in FP32 arithmetic."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().to(device)


def load_quantized(directory: str, device: str) -> Any:
    """The checkpoint in FP32 arithmetic, its inputs quantized by compressed-tensors.

    compressed-tensors rounds the weights that it decompresses to BF16. A tensor core multiplies codes and scales
    as they are, so the weights are put back in FP32, once they have been found equal up to that rounding.
    """
    model = load_source(directory, device)
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    exact = {
        name: decode(module.weight_packed.data, module.weight_scale.data, module.weight_global_scale.data)
        for name, module in packed.items()
    }
    assert exact, f"{directory} has no weight in NVFP4"
    model.hf_quantizer.compressor.decompress_model(model)
    for name, module in packed.items():
        torch.testing.assert_close(module.weight.data.float(), exact[name], rtol=2**-7, atol=0, msg=name)
        module.weight.data = exact[name]
    return model


def quantize_inputs(model: Any, enabled: bool) -> None:
    """Whether the Linears of a quantized model quantize their inputs."""
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_enabled = enabled


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """FP32 `[length, vocabulary]`, on the model's device."""
    logits: Tensor = model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0]
    return logits


def source_logits(directory: str, sequences: list[Tensor], cache: Path | None, device: str) -> Iterator[Tensor]:
    """The source's logits of each sequence, from the cache where there is one.

    Then the model is loaded only where one of them is not there yet.
    """
    if cache is None:
        model = load_source(directory, device)
        yield from (logits_of(model, tokens) for tokens in sequences)
        return
    cache.mkdir(parents=True, exist_ok=True)
    model = None
    for number, tokens in enumerate(sequences):
        path = cache / f"{number:04d}.npy"
        if not path.exists():
            model = model or load_source(directory, device)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, logits_of(model, tokens).cpu().numpy())
            partial.replace(path)
        yield torch.from_numpy(np.load(path)).to(device)


@dataclass
class Scores:
    """Per sequence, sums over its predicted tokens."""

    tokens: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    nll_source: list[float] = field(default_factory=list)

    def add(self, source: Tensor, quantized: Tensor, tokens: Tensor) -> None:
        """Both logits `[length, vocabulary]`; row t predicts token t + 1, the last row nothing."""
        sums = torch.zeros(4, dtype=torch.float64, device=source.device)
        rows = zip(*(part[:-1].split(ROWS_AT_ONCE) for part in (source, quantized)), strict=True)
        for (before, after), truth in zip(rows, tokens[1:].to(source.device).split(ROWS_AT_ONCE), strict=True):
            p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum()
            agree = (before.argmax(-1) == after.argmax(-1)).sum()
            nll, nll_source = (-part.gather(1, truth[:, None]).sum() for part in (q, p))
            sums += torch.stack([kl, agree.double(), nll, nll_source])
        for values, value in zip((self.kl, self.agree, self.nll, self.nll_source), sums.tolist(), strict=True):
            values.append(value)
        self.tokens.append(len(tokens) - 1)

    def summary(self) -> dict[str, Any]:
        """Mean and standard error a token of each measure; the ratio of perplexities with its own."""
        rise, rise_error = clustered_mean(np.subtract(self.nll, self.nll_source), self.tokens)
        ratio = float(np.exp(rise))
        return {
            "kl": clustered_mean(self.kl, self.tokens),
            "top1": clustered_mean(self.agree, self.tokens),
            "perplexity_ratio": (ratio, ratio * rise_error),
            "perplexity_source": float(np.exp(sum(self.nll_source) / sum(self.tokens))),
            "tokens": sum(self.tokens),
        }


def clustered_mean(sums: Any, counts: Any) -> tuple[float, float]:
    """Mean a token from each sequence's sum and token count, and its standard error, sequences as the clusters.

    The ratio estimator's (Cochran, Sampling Techniques, 6.3); nan for a single sequence.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean = sums.sum() / counts.sum()
    clusters = len(sums)
    if clusters < 2:
        return float(mean), float("nan")
    spread = ((sums - mean * counts) ** 2).sum() * clusters / (clusters - 1)
    return float(mean), float(spread**0.5 / counts.sum())


def evaluate(source: str, quantized: str, tokens: Path, cache: Path | None, device: str = "cpu") -> dict[str, Any]:
    """The summaries of `W4A4` and `W4A16`."""
    sequences = read_probe(tokens)
    model = load_quantized(quantized, device)
    scores = {"W4A4": Scores(), "W4A16": Scores()}
    references = source_logits(source, sequences, cache, device)
    for number, (ids, reference) in enumerate(zip(sequences, references, strict=True), 1):
        for name, score in scores.items():
            quantize_inputs(model, name == "W4A4")
            score.add(reference, logits_of(model, ids), ids)
        kl = scores["W4A4"].summary()["kl"][0]
        print(f"  {number}/{len(sequences)} sequences, KL so far {kl:.4f}", file=sys.stderr, flush=True)
    return {name: score.summary() for name, score in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("quantized")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--cache", type=Path, help="where the source's logits are kept between runs; else in memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    scores = evaluate(options.source, options.quantized, options.tokens, options.cache, options.device)
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
