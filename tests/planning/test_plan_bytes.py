"""A plan against what quantize then writes, and against what transformers, safetensors and vLLM's cuts make of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from written_configs import describe, plan

import fourge
from fourge.checkpoint.reader import Checkpoint

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]


def tensor_bytes(directory: Path) -> int:
    """As safetensors' own reader counts them."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def quantize(source: Path, output: Path, **options: Any) -> Path:
    settings = {"calibration": "random", "num_calibration_samples": 3, "num_probe_samples": 2, "max_seq_length": 16}
    fourge.quantize(str(source), output, method="max", threads=1, device="cpu", **settings | options)
    return output


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planned_files_are_those_written(architecture: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    source = pico(architecture)
    planned = plan(source).sizes
    written = quantize(source, tmp_path / "out")
    files = list(written.glob("*.safetensors"))
    assert planned.shard_bytes == sum(path.stat().st_size for path in files)
    assert planned.num_shards == len(files)
    assert planned.output_bytes == tensor_bytes(written)
    assert planned.source_bytes == tensor_bytes(source)


def test_a_tied_head_weight_only(pico: Callable[..., Path], tmp_path: Path) -> None:
    source = pico("llama", tie_word_embeddings=True)
    planned = plan(source, scheme="NVFP4A16")
    written = quantize(source, tmp_path / "out", scheme="NVFP4A16", calibration=None)
    assert planned.sizes.output_bytes == tensor_bytes(written)
    assert [part.name for part in planned.sizes.parts] == ["embedding", "attention", "MLP", "norms"]
    assert planned.quantizing is not None and planned.quantizing.disk_hidden_states == 0
    assert planned.quantizing.work.flop_bf16_lane == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_alone_says_as_much_as_the_headers(
    architecture: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    source = pico(architecture)
    alone = tmp_path / "config of mine.json"
    alone.write_bytes((source / "config.json").read_bytes())
    from_headers, from_config = plan(source), plan(alone)
    assert (from_headers.origin, from_config.origin) == ("headers", "config.json alone")
    assert from_config.sizes == from_headers.sizes
    assert from_config.gpus == from_headers.gpus


def test_a_quantized_checkpoint_is_planned_as_it_is(pico: Callable[..., Path], tmp_path: Path) -> None:
    source = pico("llama")
    written = quantize(source, tmp_path / "out")
    before, after = plan(source), plan(written)
    assert after.quantizing is None and after.sizes.source_bytes is None
    assert after.sizes.output_bytes == before.sizes.output_bytes
    assert after.sizes.shard_bytes == before.sizes.shard_bytes
    assert after.gpus == before.gpus
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((written / "config.json").read_bytes())
    assert plan(tmp_path / "alone").sizes.output_bytes == before.sizes.output_bytes


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_kv_bytes_are_those_of_a_real_cache(architecture: str, pico: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    source = pico(architecture, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan(source).kv_cache.bytes_per_token_bf16 * 10 == held


def test_arithmetic_is_what_torch_counts(pico: Callable[..., Path]) -> None:
    """But for attention, where torch counts the masked half as well, and the head, which only the probe passes."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    source = pico("llama")
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(16)[None])
    counts = counter.get_flop_counts()["Global"]
    attention, whole = counts[torch.ops.aten.bmm], counter.get_total_flops()
    head = 2 * 16 * 128 * 64
    cost = plan(source, method="max", num_calibration_samples=5, num_probe_samples=1, max_seq_length=16).quantizing
    assert cost is not None
    sequence = whole - head - attention // 2
    rotary = 2 * 16 * 8 * model.config.num_hidden_layers  # angles, counted as a product: at most that much
    assert cost.work.flop_nvfp4_lane == pytest.approx(sequence + head, abs=rotary)
    assert cost.work.flop_bf16_lane == pytest.approx(6 * sequence + head, abs=6 * rotary)


def test_bytes_read_are_those_read(pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pico("llama")
    opened: list[Checkpoint] = []
    original = Checkpoint.open.__func__  # type: ignore[attr-defined]

    def remember(cls: type[Checkpoint], directory: Path) -> Checkpoint:
        opened.append(original(cls, directory))
        return opened[-1]

    monkeypatch.setattr(Checkpoint, "open", classmethod(remember))
    samples = {"num_calibration_samples": 3, "num_probe_samples": 2, "max_seq_length": 16}
    cost = plan(source, method="max", **samples).quantizing
    quantize(source, tmp_path / "out", **samples)
    hidden = 3 * (3 + 2 * 2) * 16 * 64 * 4
    assert cost is not None
    row = 64 * 2
    looked_up_at_most = 128 * row
    assert cost.work.bytes_read - hidden - looked_up_at_most <= opened[-1].bytes_read <= cost.work.bytes_read - hidden


def test_ranks_together_hold_the_model_and_what_is_replicated(pico: Callable[..., Path], tmp_path: Path) -> None:
    """A rank's share, cut here tensor by tensor as vLLM's loaders do."""
    from fourge.planning.tensor_parallel import rank_bytes

    size = 4
    biases = {"attention_bias": True, "mlp_bias": True}
    source = pico("llama", num_attention_heads=8, hidden_size=128, intermediate_size=256, **biases)
    written = quantize(source, tmp_path / "out")
    share = 0
    for path in written.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                share += cut(name, file.get_tensor(name), size)
    rank = rank_bytes(describe(source), size)
    assert rank.weights == share
    assert rank_bytes(describe(source), 1) == type(rank)(tensor_bytes(written), 0)
    assert size * rank.weights > tensor_bytes(written)


def cut(name: str, tensor: torch.Tensor, size: int) -> int:
    """Bytes of rank 0's piece; 2 key-value heads on 4 ranks are halves, each on two of them."""
    owner, _, kind = name.rpartition(".")
    linear = owner.rpartition(".")[2]
    if kind.endswith("global_scale") or "norm" in linear:
        return tensor.nbytes
    if linear in ("k_proj", "v_proj"):
        return tensor.chunk(2, 0)[0].nbytes
    if linear in ("o_proj", "down_proj"):
        return tensor.nbytes if kind == "bias" else tensor.chunk(size, 1)[0].contiguous().nbytes
    return tensor.chunk(size, 0)[0].nbytes


def test_a_vocabulary_is_padded_to_64(pico: Callable[..., Path]) -> None:
    from fourge.planning.tensor_parallel import rank_bytes

    facts = describe(pico("llama", vocab_size=130))
    assert rank_bytes(facts, 1).weights - sum(stored.nbytes for stored in facts.output.values()) == 2 * 62 * 64 * 2


def test_a_vocabulary_must_divide_once_padded(pico: Callable[..., Path]) -> None:
    by_three = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 192}
    assert plan(pico("llama", vocab_size=128, **by_three)).tensor_parallel_sizes == (1,)
    assert plan(pico("llama", vocab_size=180, **by_three)).tensor_parallel_sizes == (1, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 128, "intermediate_size": 256},
        {"num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 1024},
    ],
)
def test_tensor_parallel_sizes_are_those_verify_finds(
    changes: dict[str, int], pico: Callable[..., Path], tmp_path: Path
) -> None:
    """Verify's own rules know no vocabulary; 128 divides by all that these heads do."""
    source = pico("llama", **changes)
    written = quantize(source, tmp_path / "out")
    check = next(check for check in fourge.verify(written).checks if check.name == "tensor_parallel")
    says = check.detail.partition(";")[0].removeprefix("tensor-parallel size ").split(", ")
    ours = [size for size in plan(source).tensor_parallel_sizes if size <= 32]
    assert [str(size) for size in ours] == says


def test_an_obstacle_is_named(pico: Callable[..., Path]) -> None:
    report = plan(pico("llama"))
    assert report.tensor_parallel_sizes == (1,)
    assert "mlp.down_proj has 48 columns a rank" in report.tensor_parallel_obstacles[2]
    assert json.dumps(report.tensor_parallel_obstacles)
