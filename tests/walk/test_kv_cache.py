"""The FP8 KV cache against transformers' own cache, compressed-tensors' forward, and a loop over values."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_lanes import MODELS, load_quantized, sequences, transformers_logits, walk_lane

import fourge
from fourge.checkpoint.compressed_tensors import quantization_config
from fourge.data.tokens import read_token_sets
from fourge.errors import InputError
from fourge.walk.kv_cache import KvObserver, kv_scale, round_to_fp8

SETS: dict[str, Any] = {
    "method": "max",
    "calibration": "random",
    "num_calibration_samples": 4,
    "num_probe_samples": 3,
    "max_seq_length": 24,
    "threads": 1,
}


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in directory.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def scales(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in read(directory).items() if name.endswith((".k_scale", ".v_scale"))}


def every_e4m3_value() -> np.ndarray:
    """The finite E4M3 values in ascending order, from their definition: 4 exponent bits (bias 7), 3 mantissa bits."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    positive = np.array(subnormal + normal)
    return np.unique(np.concatenate([-positive, positive]))


# The scales


@pytest.mark.parametrize("name", MODELS)
def test_scales_are_what_transformers_caches(name: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    """amax / 448, to the bit, of the keys and values that transformers' own forward puts into its DynamicCache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    architecture, changes = MODELS[name]
    model = pico(architecture, **changes)
    fourge.quantize(str(model), tmp_path / "out", kv_cache_scheme="fp8", micro_batch_tokens=24, **SETS)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    largest = torch.zeros(2, 2)
    for tokens in read_token_sets(tmp_path / "out" / ".fourge" / "tokens.safetensors").calibration.sequences:
        cache = DynamicCache()
        with torch.no_grad():
            theirs(torch.tensor(tokens.astype(np.int64))[None], past_key_values=cache, use_cache=True)
        seen = torch.tensor([[layer.keys.abs().max(), layer.values.abs().max()] for layer in cache.layers])
        largest = torch.maximum(largest, seen)
    stored = scales(tmp_path / "out")
    assert stored.keys() == {f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in "kv"}
    for i in range(2):
        for column, kind in enumerate("kv"):
            scale = stored[f"model.layers.{i}.self_attn.{kind}_scale"]
            assert scale.dtype == torch.float32 and scale.shape == (1,)
            assert torch.equal(scale, (largest[i, column] / 448).reshape(1))


def test_a_probe_decides_nothing(pico: Callable[..., Path], tmp_path: Path) -> None:
    for samples in (0, 3):
        options = SETS | {"num_probe_samples": samples}
        fourge.quantize(str(pico()), tmp_path / str(samples), kv_cache_scheme="fp8", **options)
    assert scales(tmp_path / "0") == scales(tmp_path / "3")


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_nothing_else_in_the_files_changes(scheme: Any, pico: Callable[..., Path], tmp_path: Path) -> None:
    for kv_cache_scheme in (None, "fp8"):
        output = tmp_path / str(kv_cache_scheme)
        fourge.quantize(str(pico()), output, scheme=scheme, kv_cache_scheme=kv_cache_scheme, **SETS)  # type: ignore[arg-type]
    without, with_scales = read(tmp_path / "None"), read(tmp_path / "fp8")
    assert with_scales.keys() - without.keys() == scales(tmp_path / "fp8").keys() and len(scales(tmp_path / "fp8")) == 4
    for name, tensor in without.items():
        assert torch.equal(tensor.view(torch.uint8), with_scales[name].view(torch.uint8)), name
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == with_scales.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in with_scales.values())
    for i in range(2):
        shards = {
            index["weight_map"][f"model.layers.{i}.self_attn.{n}"]
            for n in ("k_scale", "v_scale", "o_proj.weight_packed")
        }
        assert len(shards) == 1


@pytest.mark.parametrize("values", [[3.0, -7.5, 0.25], [448.0], [1e-30]])
def test_the_scale_puts_the_largest_on_448(values: list[float]) -> None:
    scale = kv_scale(torch.tensor(max(map(abs, values))))
    assert scale.dtype == torch.float32 and scale.shape == (1,)
    assert float(scale) == np.float32(max(map(abs, values))) / np.float32(448)


def test_keys_that_are_always_zero_get_scale_1_and_an_event() -> None:
    observer, events = KvObserver(), list[dict[str, Any]]()
    observer.update(torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    found = observer.scales(events)
    assert float(found.k) == 1 and float(found.v) == pytest.approx(1 / 448)
    assert events == [{"event": "keys are always zero"}]
    assert torch.equal(round_to_fp8(torch.zeros(2, 3), found.k), torch.zeros(2, 3))


# The rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.0371, 2.5])
def test_rounding_takes_the_nearest_e4m3_value(dtype: torch.dtype, scale: float) -> None:
    """Against a search through all values: every one, every middle of two (ties to even), and beyond the range."""
    grid = every_e4m3_value()
    middles = (grid[1:] + grid[:-1]) / 2
    rng = np.random.default_rng(1)
    x = torch.tensor(np.concatenate([grid, middles, rng.normal(0, 200, 500), [464, 1e4, -3e3]]) * scale, dtype=dtype)
    factor = torch.tensor([scale], dtype=torch.float32)
    ours = round_to_fp8(x.view(1, 1, 1, -1), factor).flatten()
    for value, rounded in zip((x.float() / factor).tolist(), ours, strict=True):
        distance = np.abs(grid - value)
        nearest = grid[distance == distance.min()]
        if len(nearest) == 2:  # the even mantissa
            codes = torch.tensor(nearest).to(torch.float8_e4m3fn).view(torch.uint8)
            nearest = nearest[(codes % 2 == 0).numpy()]
        assert rounded == (torch.tensor(nearest[0], dtype=torch.float32) * factor).to(dtype)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale = torch.randn(2, 3, 7, 16).transpose(1, 2), torch.tensor([0.01])
    whole = round_to_fp8(x, scale)
    monkeypatch.setattr("fourge.walk.kv_cache._ROWS_BYTES", 200)
    assert torch.equal(round_to_fp8(x, scale), whole) and whole.shape == x.shape


# The lanes


def loop_cache(stored: dict[str, torch.Tensor]) -> Any:
    """transformers' cache, rounding what comes in value by value, by torch's own cast of each number."""
    from transformers import DynamicCache

    class LoopCache(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *rest: Any, **options: Any) -> Any:
            prefix = f"model.layers.{layer_idx}.self_attn."
            rounded = []
            for states, kind in ((key_states, "k"), (value_states, "v")):
                scale = stored[f"{prefix}{kind}_scale"][0]
                numbers = [
                    (number / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
                    for number in states.flatten()
                ]
                rounded.append(torch.stack(numbers).view(states.shape))
            return super().update(*rounded, layer_idx, *rest, **options)

    return LoopCache()


def without_kv_scheme(output: Path, folder: Path) -> Path:
    """A copy whose config says nothing of the cache, so that transformers leaves keys and values alone."""
    shutil.copytree(output, folder, ignore=shutil.ignore_patterns(".fourge"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["llama-3.1-rope", "mistral-sliding-window", "qwen3"])
def test_lane_is_transformers_with_a_cache_rounded_by_a_loop(
    name: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    architecture, changes = MODELS[name]
    model, output = pico(architecture, **changes), tmp_path / "out"
    fourge.quantize(str(model), output, kv_cache_scheme="fp8", **SETS)
    theirs = load_quantized(without_kv_scheme(output, tmp_path / "plain"))
    ours = walk_lane(model, tmp_path / "walk", torch.float32, output)
    ordered = sorted(sequences(), key=len, reverse=True)
    for batch in (ordered[:2], ordered[2:3], ordered[3:]):
        ids = torch.tensor(np.stack(batch).astype(np.int64))
        with torch.no_grad():
            rounded = theirs(ids, past_key_values=loop_cache(scales(output)), use_cache=True).logits
            plain = theirs(ids).logits
        for tokens, expected, other in zip(ids, rounded, plain, strict=True):
            mine = ours[tokens.numpy().tobytes()]
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
            assert (mine - other).abs().max() > 1e-2, "the cache costs nothing here: the comparison says nothing"


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("name", MODELS)
def test_lane_is_transformers_with_compressed_tensors(
    name: str, scheme: Any, pico: Callable[..., Path], tmp_path: Path
) -> None:
    """compressed-tensors rounds the cache itself when the config tells it to; our lane's logits are those."""
    architecture, changes = MODELS[name]
    model, output = pico(architecture, **changes), tmp_path / "out"
    fourge.quantize(str(model), output, scheme=scheme, kv_cache_scheme="fp8", **SETS)
    theirs = load_quantized(output)
    attention = theirs.model.layers[0].self_attn
    assert torch.equal(attention.k_scale, scales(output)["model.layers.0.self_attn.k_scale"])
    expected = transformers_logits(theirs)
    ours = walk_lane(model, tmp_path / "walk", torch.float32, output)
    for key, reference in expected.items():
        assert torch.equal(ours[key], reference)


@pytest.mark.parametrize("method", ["max", "gptq"])
def test_the_recorded_kl_has_the_cache_in_it(method: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    """From transformers' logits of the source and of our checkpoint, whose cache compressed-tensors rounds."""
    from transformers import AutoModelForCausalLM

    model, output, options = pico(), tmp_path / "out", SETS | {"num_calibration_samples": 8, "method": method}
    result = fourge.quantize(str(model), output, kv_cache_scheme="fp8", **options)
    assert result.fidelity is not None
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for after in (load_quantized(output), load_quantized(without_kv_scheme(output, tmp_path / "plain"))):
        kl = []
        for tokens in read_token_sets(output / ".fourge" / "tokens.safetensors").probe.sequences:
            ids = torch.tensor(tokens.astype(np.int64))[None]
            with torch.no_grad():
                p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (before, after))
            kl.append((p.exp() * (p - q)).sum(-1))
        found.append(float(torch.cat(kl).mean()))
    assert result.fidelity["kl_div"]["mean"] == pytest.approx(found[0], rel=1e-4)
    assert abs(found[0] - found[1]) > 1e-3 * found[1], "the cache costs nothing here"


def test_the_bf16_lane_knows_nothing_of_it(pico: Callable[..., Path], tmp_path: Path) -> None:
    without, with_scales = (
        fourge.quantize(str(pico()), tmp_path / str(scheme), kv_cache_scheme=scheme, **SETS)  # type: ignore[arg-type]
        for scheme in (None, "fp8")
    )
    assert without.fidelity is not None and with_scales.fidelity is not None
    assert without.fidelity["perplexity_bf16"] == with_scales.fidelity["perplexity_bf16"]
    assert without.fidelity["perplexity_nvfp4"] != with_scales.fidelity["perplexity_nvfp4"]


# The config


def test_config_is_parsed_by_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(quantization_config("NVFP4", ["lm_head"], "fp8"))
    scheme = parsed.kv_cache_scheme
    assert scheme is not None
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
    assert scheme.symmetric is True and scheme.dynamic is False
    assert parsed.model_dump() == parsed.model_validate(parsed.model_dump()).model_dump()


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_without_data_there_are_no_scales(scheme: Any, pico: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--calibration none: "):
        fourge.quantize(
            str(pico()), tmp_path / "out", scheme=scheme, kv_cache_scheme="fp8", calibration="none", threads=1
        )
    assert not (tmp_path / "out").exists()


def test_a_continued_run_must_ask_for_the_same(pico: Callable[..., Path], tmp_path: Path) -> None:
    fourge.quantize(str(pico()), tmp_path / "out", kv_cache_scheme="fp8", **SETS)
    with pytest.raises(InputError, match="kv_cache_scheme = 'fp8', now it is None"):
        fourge.quantize(str(pico()), tmp_path / "out", **SETS)
