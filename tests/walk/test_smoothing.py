"""Smoothing in the walk: folded in exactly, decided on validation tokens alone, and left out where it does harm."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fourge
import fourge.walk.smoothing
from fourge.checkpoint.reader import Checkpoint
from fourge.methods.smooth import MOST, Sample, Tie
from fourge.walk.choices import Selection
from fourge.walk.folding import (
    decode_exponents,
    encode_exponents,
    find_tie,
    scale_,
    scalings,
    survives,
)
from fourge.walk.model import describe_model
from fourge.walk.smoothing import InputSample

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "one-key-value-head": ("llama", {"num_key_value_heads": 1}),
}
OPTIONS: dict[str, Any] = {
    "calibration": "random",
    "num_calibration_samples": 12,
    "num_probe_samples": 2,
    "max_seq_length": 12,
    "threads": 1,
}


def recorded(output: Path) -> list[dict[str, dict[str, Any]]]:
    """What job.json says of smoothing, layer by layer."""
    steps = json.loads((output / ".fourge" / "job.json").read_text())["steps"]
    return [step["measures"]["smoothing"] for step in steps[1:-1]]


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def folded_state(model: Path, exponents_of: Callable[[str, int], Tensor]) -> dict[str, Tensor]:
    """The source's tensors, smoothed by `exponents_of(group, channels)` in every layer."""
    source = Checkpoint.open(model)
    skeleton, layout, _ = describe_model(source, Selection(), torch.device("cpu"))
    state = {name: source.read(name) for name in source.tensors}
    for layer in range(layout.num_layers):
        prefix = layout.architecture.layer_prefix(layer)
        shapes = {n.removeprefix(prefix): s for n, s in layout.shapes.items() if n.startswith(prefix)}
        for group in layout.groups(layer):
            tie = find_tie(group, shapes, skeleton.config.num_key_value_heads)
            exponents = exponents_of(group.name, shapes[f"{group.fed_by}.weight"][0])
            for scaling in scalings(group, exponents, tie, shapes):
                scale_(state[prefix + scaling.name], scaling.dim, scaling.exponents)
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_folding_is_exact(name: str, dtype: torch.dtype, pico: Callable[..., Path]) -> None:
    """transformers' logits of the smoothed source are the source's, bit for bit, whatever the exponents."""
    from transformers import AutoModelForCausalLM

    architecture, changes = MODELS[name]
    model = pico(architecture, **changes)
    generator = torch.Generator().manual_seed(1)

    def exponents_of(group: str, channels: int) -> Tensor:
        return torch.randint(-MOST, MOST + 1, (channels,), dtype=torch.int8, generator=generator)

    state = folded_state(model, exponents_of)
    before = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    after = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    after.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    changed = [name for name, tensor in before.state_dict().items() if not tensor.equal(after.state_dict()[name])]
    assert len(changed) == 2 * 9 + sum(name.endswith(("v_proj.bias", "up_proj.bias")) for name in state)
    ids = torch.randint(3, 128, (3, 20), generator=generator)
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_shards_hold_the_source_folded_as_recorded(
    name: str, scheme: Any, pico: Callable[..., Path], tmp_path: Path
) -> None:
    """Norms and biases in the file are the source's times the recorded powers of two, channel by channel."""
    architecture, changes = MODELS[name]
    model = pico(architecture, **changes)
    fourge.quantize(str(model), tmp_path / "out", smooth=True, scheme=scheme, **OPTIONS)
    source, ours = stored(model), stored(tmp_path / "out")
    groups = {
        "input_layernorm.weight": "self_attn.q_proj+k_proj+v_proj",
        "post_attention_layernorm.weight": "mlp.gate_proj+up_proj",
        "self_attn.v_proj.bias": "self_attn.o_proj",
        "mlp.up_proj.bias": "mlp.down_proj",
    }
    kept = 0
    for layer, entries in enumerate(recorded(tmp_path / "out")):
        for suffix, group in groups.items():
            full = f"model.layers.{layer}.{suffix}"
            if full in source:
                exponents = decode_exponents(entries[group]["exponents"]) if entries[group]["kept"] else torch.zeros(1)
                assert torch.equal(ours[full].double(), source[full].double() / 2.0 ** exponents.double())
        kept += sum(entry["kept"] for entry in entries.values())
        for entry in entries.values():
            before, after = entry["validation_error"]
            assert entry["kept"] == (after < before)
    assert kept >= 4, "planted outliers, and hardly anything was smoothed"
    untouched = [n for n in source if n in ours and not n.endswith(tuple(groups))]
    assert untouched
    assert all(torch.equal(ours[n], source[n]) for n in untouched)


def test_a_group_that_validation_speaks_against_is_not_kept(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exponents that ruin one group, whatever calibration says for them: that group alone stays as it was."""
    choose = fourge.walk.smoothing.choose

    def misled(sample: Sample, tie: Tie, rounding: Any, each: Any) -> tuple[tuple[float, float], Tensor]:
        powers, exponents = choose(sample, tie, rounding, each)
        if sample.inputs.shape[1] == 96:  # down_proj
            exponents = torch.tensor([-MOST, MOST], dtype=torch.int8).repeat(48)
        return powers, exponents

    monkeypatch.setattr(fourge.walk.smoothing, "choose", misled)
    fourge.quantize(str(pico()), tmp_path / "out", smooth=True, **OPTIONS)
    for entries in recorded(tmp_path / "out"):
        before, after = entries["mlp.down_proj"]["validation_error"]
        assert after > before
        assert not entries["mlp.down_proj"]["kept"]
        assert any(entry["kept"] for entry in entries.values())


def test_where_nothing_is_kept_the_output_is_that_without_smoothing(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruinous(sample: Sample, tie: Tie, *rest: Any) -> tuple[tuple[float, float], Tensor]:
        channels = sample.inputs.shape[1] // tie.repeats
        return (0.5, 0.0), torch.tensor([-MOST, MOST], dtype=torch.int8).repeat(channels // 2)

    fourge.quantize(str(pico()), tmp_path / "plain", method="gptq", **OPTIONS)
    monkeypatch.setattr(fourge.walk.smoothing, "choose", ruinous)
    fourge.quantize(str(pico()), tmp_path / "out", method="gptq", smooth=True, **OPTIONS)
    assert not any(entry["kept"] for entries in recorded(tmp_path / "out") for entry in entries.values())
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_only_what_feeds_a_quantized_group_is_scaled(pico: Callable[..., Path], tmp_path: Path) -> None:
    """down_proj quantized alone: up_proj stays in BF16, with scaled rows, and verify follows."""
    fourge.quantize(str(pico()), tmp_path / "out", smooth=True, targets=["re:.*down_proj"], **OPTIONS)
    source, ours = stored(pico()), stored(tmp_path / "out")
    for layer, entries in enumerate(recorded(tmp_path / "out")):
        assert entries.keys() == {"mlp.down_proj"}
        assert entries["mlp.down_proj"]["kept"]
        exponents = decode_exponents(entries["mlp.down_proj"]["exponents"])
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(ours[name].double(), source[name].double() / 2.0 ** exponents.double()[:, None])
    assert fourge.verify(tmp_path / "out", source=str(pico()), deep=True, threads=1).passed


def test_a_channel_that_would_lose_bits_is_left_alone() -> None:
    tiny, huge = 2.0**-126, 2.0**127
    tensor = torch.tensor([[1.0, tiny, huge], [0.0, 3.0, 1.5], [-tiny / 8, 1.0, 2.0]]).bfloat16()
    up, down = torch.full((3,), 1, dtype=torch.int8), torch.full((3,), -1, dtype=torch.int8)
    assert survives(tensor, 1, up).tolist() == [True, True, False]
    assert survives(tensor, 0, up).tolist() == [False, True, True]
    assert survives(tensor, 1, 2 * down).tolist() == [True, True, True]  # subnormals hold powers of two, down to 2^-133
    assert survives(tensor, 1, 6 * down).tolist() == [False, True, True]
    odd = torch.tensor([3 * tiny / 64, 3 * tiny / 128]).bfloat16()
    assert survives(odd, 0, down[:2]).tolist() == [True, False]


def test_a_subnormal_weight_is_reported_and_its_channel_not_scaled(pico: Callable[..., Path], tmp_path: Path) -> None:
    """A model of which one norm weight has no bits to spare: its channel stays, the others are smoothed."""
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    for path in pico().iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    # gate and up read this channel through large weights, so that it is made louder, and its weights smaller.
    for linear in ("gate_proj", "up_proj"):
        weight = tensors[f"model.layers.0.mlp.{linear}.weight"]
        weight[:, 0] *= 1000
        weight[0, 0] = 3 * 2.0**-133
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fourge.quantize(str(model), tmp_path / "out", method="search", smooth=True, **OPTIONS)
    job = json.loads((tmp_path / "out" / ".fourge" / "job.json").read_text())
    (event,) = job["steps"][1]["events"]
    assert event == {
        "event": "channels not smoothed, for not exactly",
        "group": "mlp.gate_proj+up_proj",
        "channels": 1,
    }
    entry = job["steps"][1]["measures"]["smoothing"]["mlp.gate_proj+up_proj"]
    assert entry["kept"]
    assert decode_exponents(entry["exponents"])[0] == 0
    assert fourge.verify(tmp_path / "out", source=str(model), deep=True, threads=1).passed


def test_a_sample_is_drawn_without_regard_to_how_the_input_comes() -> None:
    x = torch.arange(3000.0)[:, None] * torch.ones(4)
    whole, parts = InputSample(3000, 5), InputSample(3000, 5)
    whole.add(x)
    for part in x.split(700):
        parts.add(parts.summarise(part.view(1, -1, 4)))
    rows = whole.rows()
    assert torch.equal(rows, parts.rows())
    assert rows.shape == (1024, 4)
    assert len(set(rows[:, 0].tolist())) == 1024
    few = InputSample(3, 5)
    few.add(x[:3])
    assert torch.equal(few.rows(), x[:3])


def test_exponents_as_text() -> None:
    exponents = torch.tensor([0, -8, 8, 3, -1], dtype=torch.int8)
    assert torch.equal(decode_exponents(encode_exponents(exponents)), exponents)
    for text in ("not base64!", encode_exponents(torch.tensor([9], dtype=torch.int8))):
        with pytest.raises(ValueError):
            decode_exponents(text)
