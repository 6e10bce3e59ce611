"""Both lanes against transformers: its own forward, on the source and on the checkpoint that we wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fourge
from fourge.checkpoint.compressed_tensors import KvScales, QuantizedLinear
from fourge.checkpoint.reader import Checkpoint
from fourge.checkpoint.source import locate
from fourge.data.tokens import read_token_sets
from fourge.nvfp4.fp8 import Fp8Weight, dequantize_rows
from fourge.nvfp4.quantize import QuantizedWeight, dequantize_weight
from fourge.recipe_file import read_recipe_file
from fourge.settings import Rule
from fourge.walk.choices import Selection
from fourge.walk.hidden import HiddenFile
from fourge.walk.lanes import quantized_layer
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
SETS: dict[str, Any] = {
    "method": "max",
    "calibration": "random",
    "num_calibration_samples": 4,
    "num_probe_samples": 3,
    "max_seq_length": 24,
}


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 128, length).astype(np.int32) for length in (24, 24, 17, 5)]


def walk_lane(
    model: Path, folder: Path, dtype: torch.dtype, quantized: Path | None = None, rules: tuple[Rule, ...] = ()
) -> dict[bytes, torch.Tensor]:
    """Logits `[length, vocabulary]` by the walk, keyed by the sequence's bytes; of `quantized` where it is given."""
    source = Checkpoint.open(locate(str(model)))
    skeleton, layout, _ = describe_model(source, Selection(rules=rules), CPU)
    streams = lay_out([("probe", "nvfp4" if quantized else "bf16", sequences())], micro_batch_tokens=48)
    walk = Walk(skeleton, source, streams, dtype, CPU)
    folder.mkdir()
    with HiddenFile(folder / "0", walk.hidden_layout, create=True) as target:
        walk.embed(target, lambda *_: None)
    for layer in range(layout.num_layers):
        prefix = layout.architecture.layer_prefix(layer)
        names = layout.steps[layer + 1]
        if quantized is None:
            weights = {name.removeprefix(prefix): source.read(name) for name in names}
            lane = LaneLayer(skeleton, layer, weights, dtype)
        else:
            kept = {
                n.removeprefix(prefix): source.read(n) for n in names if n[: -len(".weight")] not in layout.quantized
            }
            linears, kv_scales = read_linears(quantized, prefix), read_kv_scales(quantized, prefix)
            lane = quantized_layer(walk, layout, layer, kept, linears, kv_scales=kv_scales)
        with (
            HiddenFile(folder / str(layer), walk.hidden_layout, create=False) as before,
            HiddenFile(folder / str(layer + 1), walk.hidden_layout, create=True) as after,
        ):
            walk.run(lane, streams[0], before, after, lambda *_: None)
    norm = skeleton.new_final_norm()
    fill(norm, {"weight": source.read("model.norm.weight")}, dtype)
    head = source.read("model.embed_tokens.weight" if skeleton.tied_head else "lm_head.weight").to(dtype)
    logits = {}
    with HiddenFile(folder / str(layout.num_layers), walk.hidden_layout, create=False) as states, torch.no_grad():
        for batch in streams[0].batches:
            rows = states.read(batch.first_row, batch.last_row).view(batch.count, batch.length, -1)
            for tokens, result in zip(streams[0].tokens(batch), nn.functional.linear(norm(rows), head), strict=True):
                logits[tokens.numpy().tobytes()] = result
    return logits


def read_linears(checkpoint: Path, prefix: str) -> dict[str, QuantizedLinear]:
    """The quantized Linears of a layer, read by safetensors' own reader."""
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for shard in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name.startswith(prefix):
                linear, _, part = name.removeprefix(prefix).rpartition(".")
                stored.setdefault(linear, {})[part] = tensor
    return {linear: as_stored(parts) for linear, parts in stored.items() if "weight_scale" in parts}


def as_stored(parts: dict[str, torch.Tensor]) -> QuantizedLinear:
    """A Linear from its tensors: FP8 where they hold the weight under its own name."""
    if "weight" in parts:
        return QuantizedLinear(Fp8Weight(parts["weight"], parts["weight_scale"]), None)
    weight = QuantizedWeight(parts["weight_packed"], parts["weight_scale"], parts["weight_global_scale"])
    return QuantizedLinear(weight, parts.get("input_global_scale"))


def read_kv_scales(checkpoint: Path, prefix: str) -> KvScales | None:
    """The scales of a layer's KV cache, where it has some, likewise."""
    stored = {name: tensor for shard in checkpoint.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    names = [f"{prefix}self_attn.{name}" for name in ("k_scale", "v_scale")]
    return KvScales(*(stored[name] for name in names)) if names[0] in stored else None


def transformers_logits(model: Any) -> dict[bytes, torch.Tensor]:
    """transformers' logits, in the batches that the walk makes: the pair of equal length, the others alone."""
    ordered = sorted(sequences(), key=len, reverse=True)
    logits = {}
    for batch in (ordered[:2], ordered[2:3], ordered[3:]):
        ids = torch.tensor(np.stack(batch).astype(np.int64))
        with torch.no_grad():
            for tokens, result in zip(ids, model(ids).logits, strict=True):
                logits[tokens.numpy().tobytes()] = result
    return logits


def load_quantized(checkpoint: Path) -> Any:
    """transformers' model of our checkpoint in FP32 arithmetic; inputs are quantized as its config says.

    compressed-tensors decompresses a weight to BF16 whatever dtype is asked for, where e2m1 · scale / global_scale
    has more bits than BF16 holds. Here its weights are required to be ours in BF16, and then replaced by ours in
    FP32: a tensor core multiplies the codes themselves and so loses none of those bits, as our lane does not.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.hf_quantizer.compressor.decompress_model(model)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for linear, ours in read_linears(checkpoint, prefix).items():
            module = model.get_submodule(prefix + linear)
            if isinstance(ours.weight, Fp8Weight):  # in its scale's dtype, which is that asked for: nothing is lost
                assert torch.equal(module.weight, dequantize_rows(ours.weight)), linear
                continue
            exact = dequantize_weight(ours.weight)
            assert torch.equal(module.weight, exact.bfloat16()), linear
            module.weight.data = exact
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_lane_is_transformers_to_the_bit(
    name: str, dtype: torch.dtype, pico: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    architecture, changes = MODELS[name]
    model = pico(architecture, **changes)
    ours = walk_lane(model, tmp_path / "walk", dtype)
    theirs = transformers_logits(AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa"))
    assert ours.keys() == theirs.keys()
    for key, reference in theirs.items():
        assert torch.equal(ours[key], reference)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("name", MODELS)
def test_nvfp4_lane_is_transformers_with_compressed_tensors(
    name: str, scheme: Any, pico: Callable[..., Path], tmp_path: Path
) -> None:
    """What we wrote, loaded by transformers, gives our nvfp4 lane's logits to the bit; see `load_quantized`."""
    architecture, changes = MODELS[name]
    model, output = pico(architecture, **changes), tmp_path / "out"
    fourge.quantize(str(model), output, scheme=scheme, **SETS)
    theirs = load_quantized(output)
    expected = transformers_logits(theirs)
    ours_logits = walk_lane(model, tmp_path / "walk", torch.float32, output)
    for key, reference in expected.items():
        assert torch.equal(ours_logits[key], reference)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_the_lane_of_a_mixture_is_transformers_with_compressed_tensors(
    name: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    """FP8, NVFP4, weight-only NVFP4 and BF16 side by side: to the bit, as above."""
    architecture, changes = MODELS[name]
    model, output, recipe = pico(architecture, **changes), tmp_path / "out", tmp_path / "recipe.json"
    rules = [
        {"targets": "re:.*layers.0.self_attn.[qkv]_proj", "scheme": "FP8"},
        {"targets": "model.layers.0.mlp.down_proj", "scheme": "NVFP4A16"},
        {"targets": "re:.*down_proj", "scheme": "FP8"},
        {"targets": "model.layers.1.self_attn.o_proj", "scheme": "BF16"},
    ]
    recipe.write_text(json.dumps({"rules": rules}))
    result = fourge.quantize(str(model), output, recipe_file=recipe, **SETS)
    assert result.quantized_linears == 13
    expected = transformers_logits(load_quantized(output))
    ours = walk_lane(model, tmp_path / "walk", torch.float32, output, read_recipe_file(recipe))
    for key, reference in expected.items():
        assert torch.equal(ours[key], reference)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("name", MODELS)
def test_fidelity_is_what_transformers_measures_on_our_checkpoint(
    name: str, scheme: Any, pico: Callable[..., Path], tmp_path: Path
) -> None:
    """KL and top-1 agreement from transformers' logits of source and checkpoint are those that the walk reported."""
    from transformers import AutoModelForCausalLM

    architecture, changes = MODELS[name]
    model, output = pico(architecture, **changes), tmp_path / "out"
    result = fourge.quantize(str(model), output, scheme=scheme, **SETS)
    assert result.fidelity is not None
    probe = read_token_sets(output / ".fourge" / "tokens.safetensors").probe
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    after = load_quantized(output)
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
    # The logits are equal; what is left is the exponentials, FP32 in the walk and FP64 here.
    assert result.fidelity["kl_div"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert result.fidelity["kl_div"]["tokens"] == len(torch.cat(kl))
    assert result.fidelity["top1_agreement"]["mean"] == pytest.approx(float(torch.cat(agree).mean()))
