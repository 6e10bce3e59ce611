"""Bad input: one clear line that names what is wrong and the mend, exit code 2, nothing half-written."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fourge.walk.resources
from fourge.cli import app

SMALL = ["--calibration", "random", "--num-calibration-samples", "3", "--num-probe-samples", "2"]
SMALL += ["--max-seq-length", "12", "--threads", "1", "--method", "max"]


@pytest.fixture
def model(pico: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a pico model to be damaged."""
    return Path(shutil.copytree(pico(), tmp_path / "model"))


@pytest.fixture
def refuse(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`refuse(model, *options)`: runs quantize, requires a refusal that leaves nothing, returns its line."""
    output = tmp_path / "out"

    def run(model: Path | str, *options: str, keeps: bool = False) -> str:
        result = CliRunner().invoke(app, ["quantize", str(model), "-o", str(output), *SMALL, *options])
        assert result.exit_code == 2, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("fourge: ")]
        assert len(lines) == 1, result.stderr
        if not keeps:
            assert not output.exists() or not any(output.iterdir()), "something was left behind"
        return lines[0]

    yield run
    assert not list(tmp_path.rglob("*.tmp"))


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Applies `change` to the tensors of a single-file checkpoint."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_truncated_file(model: Path, refuse: Callable[..., str]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    line = refuse(model)
    assert "model.safetensors" in line and "truncated" in line


def test_a_huge_header_length(model: Path, refuse: Callable[..., str]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    assert "header" in refuse(model)


def test_an_index_that_leaves_the_directory(model: Path, refuse: Callable[..., str]) -> None:
    shutil.move(model / "model.safetensors", model.parent / "stolen.safetensors")
    names = list(load_file(model.parent / "stolen.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../stolen.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../stolen.safetensors" in refuse(model)


def test_a_missing_shard(pico: Callable[..., Path], tmp_path: Path, refuse: Callable[..., str]) -> None:
    model = Path(shutil.copytree(pico(max_shard_size="60KB"), tmp_path / "sharded"))
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    line = refuse(model)
    assert shards[1].name in line and "missing" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [DOWN, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_tensor_that_is_not_finite(model: Path, refuse: Callable[..., str], value: float, name: str) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[37] = value

    rewrite(model, damage)
    columns = load_file(model / "model.safetensors")[name].shape[-1]
    where = [37 // columns, 37 % columns] if name != "model.norm.weight" else [37]
    line = refuse(model, keeps=name == DOWN)
    assert f"{name}{where}" in line


def test_columns_that_are_no_multiple_of_16(
    pico: Callable[..., Path], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    odd = pico(intermediate_size=88)
    line = refuse(odd)
    assert "down_proj" in line and "88" in line and "--ignore" in line
    mend = ["--ignore", "lm_head", "--ignore", "re:.*down_proj"]
    result = CliRunner().invoke(app, ["quantize", str(odd), "-o", str(tmp_path / "out"), *SMALL, *mend])
    assert result.exit_code == 0, result.output


@pytest.mark.shared
def test_a_real_model_with_172_columns(shared: Path, refuse: Callable[..., str]) -> None:
    line = refuse(shared / "data" / "models" / "stories260K")
    assert "down_proj" in line and "172" in line


def test_a_shape_that_disagrees_with_the_config(model: Path, refuse: Callable[..., str]) -> None:
    edit_config(model, intermediate_size=112)
    line = refuse(model)
    assert "mlp" in line and "config.json" in line


def test_a_missing_and_an_extra_tensor(model: Path, refuse: Callable[..., str]) -> None:
    rewrite(model, lambda tensors: tensors.pop(DOWN))
    assert DOWN in refuse(model)
    rewrite(model, lambda tensors: tensors.update({DOWN: torch.zeros(64, 96, dtype=torch.bfloat16)}))
    rewrite(model, lambda tensors: tensors.update({"model.layers.0.surprise": torch.zeros(3)}))
    assert "surprise" in refuse(model)


def test_an_unknown_architecture_lists_the_known(model: Path, refuse: Callable[..., str]) -> None:
    edit_config(model, architectures=["GPT2LMHeadModel"])
    line = refuse(model)
    assert all(name in line for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"))


def test_an_already_quantized_source(model: Path, refuse: Callable[..., str]) -> None:
    edit_config(model, quantization_config={"quant_method": "compressed-tensors"})
    assert "already quantized" in refuse(model)


def test_pickles_are_refused_with_the_mend(model: Path, refuse: Callable[..., str]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "safetensors" in refuse(model)


def test_no_such_model(tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nobody/nothing" in refuse("nobody/nothing")


def test_an_output_that_holds_something_else(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    result = CliRunner().invoke(app, ["quantize", str(model), "-o", str(output), *SMALL])
    assert result.exit_code == 2 and "holds other files" in result.stderr
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    result = CliRunner().invoke(app, ["quantize", str(model), "-o", str(model), *SMALL])
    assert result.exit_code == 2 and "the source itself" in result.stderr


def test_too_little_disk(model: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(model)._replace(free=1000)
    monkeypatch.setattr(fourge.walk.resources.shutil, "disk_usage", lambda path: usage)
    line = refuse(model)
    assert "1.0 kB are free" in line and "are needed" in line


def test_too_little_memory(model: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fourge.walk.resources, "available_memory", lambda: 5_000_000)
    line = refuse(model)
    assert "5.0 MB are there" in line and "are needed" in line


@pytest.mark.parametrize("text", ["", '{"text": "ba be bi"}\n'])
def test_an_empty_or_too_short_calibration_set(
    model: Path, tmp_path: Path, refuse: Callable[..., str], text: str
) -> None:
    path = tmp_path / "calibration.jsonl"
    path.write_text(text)
    line = refuse(model, "--calibration", str(path))
    assert "calibration.jsonl" in line


def test_a_chat_template_that_raises(model: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    path = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "ba be bi"}]}
    path.write_text("\n".join(json.dumps(chat) for _ in range(9)))
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in refuse(model, "--calibration", str(path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "magic"], "known are: max"),
        (["--ignore", "re:["], "not a regular expression"),
        (["--ignore", "lm_haed"], "matches no Linear"),
        (["--ignore", "re:.*k_proj", "--ignore", "lm_head"], "as one matrix"),
        (["--ignore", "re:.*_proj", "--ignore", "lm_head"], "leave no Linear"),
        (["--ignore", "re:.*layers.0.*"], "add it to --ignore"),
        (["--device", "tpu"], "not cpu, cuda"),
        (["--calibration", "none"], "--scheme NVFP4A16"),
    ],
)
def test_options_that_cannot_be(model: Path, refuse: Callable[..., str], options: list[str], expected: str) -> None:
    assert expected in refuse(model, *options)


def test_activations_that_overflow_are_named(model: Path, refuse: Callable[..., str]) -> None:
    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)

    rewrite(model, blow_up)
    assert "layer 0" in refuse(model, keeps=True)


def test_the_tokenizer_of_another_model(model: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:16].clone()

    rewrite(model, shrink)
    edit_config(model, vocab_size=16)
    path = tmp_path / "text.jsonl"
    words = [f"w{i} w{i + 1} w{i + 2}" for i in np.arange(40)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in words))
    assert "tokenizer" in refuse(model, "--calibration", str(path))
