"""Both lanes against transformers: its own forward, on the source and on the checkpoint that we wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fourge
from fourge.checkpoint.reader import Checkpoint
from fourge.checkpoint.source import locate
from fourge.data.tokens import read_token_sets
from fourge.walk.hidden import HiddenFile
from fourge.walk.layer import LaneLayer, fill
from fourge.walk.model import describe_model
from fourge.walk.streams import lay_out
from fourge.walk.walk import Walk

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3.1-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-sliding-window": ("mistral", {"sliding_window": 8}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding-upper-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
}
CPU = torch.device("cpu")


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 128, length).astype(np.int32) for length in (24, 24, 17, 5)]


def walk_bf16_lane(model: Path, folder: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits `[length, vocabulary]` of each sequence, by the walk."""
    source = Checkpoint.open(locate(str(model)))
    skeleton, layout = describe_model(source, ["Linear"], ["lm_head"], CPU)
    streams = lay_out([("probe", "bf16", sequences())], micro_batch_tokens=48)
    walk = Walk(skeleton, source, streams, dtype, CPU)
    with HiddenFile(folder / "0", walk.hidden_layout, create=True) as target:
        walk.embed(target, lambda *_: None)
    for layer in range(layout.num_layers):
        prefix = layout.architecture.layer_prefix(layer)
        weights = {name.removeprefix(prefix): source.read(name) for name in layout.steps[layer + 1]}
        with (
            HiddenFile(folder / str(layer), walk.hidden_layout, create=False) as before,
            HiddenFile(folder / str(layer + 1), walk.hidden_layout, create=True) as after,
        ):
            walk.run(LaneLayer(skeleton, layer, weights, dtype), streams[0], before, after, lambda *_: None)
    norm = skeleton.new_final_norm()
    fill(norm, {"weight": source.read("model.norm.weight")}, dtype)
    owner = "model.embed_tokens.weight" if skeleton.tied_head else "lm_head.weight"
    head = source.read(owner).to(dtype)
    logits = []
    with HiddenFile(folder / str(layout.num_layers), walk.hidden_layout, create=False) as states, torch.no_grad():
        for batch in streams[0].batches:
            rows = states.read(batch.first_row, batch.last_row).view(batch.count, batch.length, -1)
            logits += list(torch.nn.functional.linear(norm(rows), head))
    return logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_lane_is_transformers_to_the_bit(
    name: str, dtype: torch.dtype, pico: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    architecture, changes = MODELS[name]
    model = pico(architecture, **changes)
    ours = walk_bf16_lane(model, tmp_path, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
    ordered = sorted(sequences(), key=len, reverse=True)
    pair = torch.tensor(np.stack(ordered[:2]).astype(np.int64))
    with torch.no_grad():
        expected = [*theirs(pair).logits] + [
            theirs(torch.tensor(tokens.astype(np.int64))[None]).logits[0] for tokens in ordered[2:]
        ]
    for mine, reference in zip(ours, expected, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("name", MODELS)
def test_fidelity_is_what_transformers_measures_on_our_checkpoint(
    name: str, scheme: Any, pico: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers with compressed-tensors loads what we wrote; its logits give the KL that our walk reported.

    Both compute in FP32 on the same quantized values. compressed-tensors keeps the decompressed weight in BF16,
    where e2m1 · scale / global_scale is rounded once more, so the two agree to BF16's precision, not to the bit:
    see the next test, which takes that rounding away.
    """
    from transformers import AutoModelForCausalLM

    architecture, changes = MODELS[name]
    model, output = pico(architecture, **changes), tmp_path / "out"
    result = fourge.quantize(
        str(model),
        output,
        scheme=scheme,
        calibration="random",
        num_calibration_samples=4,
        num_probe_samples=3,
        max_seq_length=24,
    )
    assert result.fidelity is not None
    probe = read_token_sets(output / ".fourge" / "tokens.safetensors").probe
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    after = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    kl, agree = [], []
    for tokens in probe.sequences:
        ids = torch.tensor(tokens.astype(np.int64))[None]
        with torch.no_grad():
            p = before(ids).logits[0, :-1].double().log_softmax(-1)
            q = after(ids).logits[0, :-1].double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append((p.argmax(-1) == q.argmax(-1)).double())
    expected = float(torch.cat(kl).mean())
    assert expected > 1e-3, "the model is too easy to quantize: the comparison would say nothing"
    assert result.fidelity["kl_div"]["mean"] == pytest.approx(expected, rel=0.02)
    assert result.fidelity["kl_div"]["tokens"] == len(torch.cat(kl))
    assert result.fidelity["top1_agreement"]["mean"] == pytest.approx(float(torch.cat(agree).mean()), abs=0.05)
