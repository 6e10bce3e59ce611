"""There and back again, to the byte; and on the way the same values under NVIDIA's names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from both_layouts import LEADS_BACK, LEADS_NOWHERE, PRODUCER, contents, edit_json, edit_tensors, read, set_scales
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fourge

WEIGHTS = preset_name_to_scheme("NVFP4", ["Linear"]).weights
E2M1 = np.float64([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Q_PROJ = "model.layers.0.self_attn.q_proj"
SELF_ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "koqv"]


def there_and_back(directory: Path, folder: Path) -> tuple[fourge.ConvertResult, fourge.ConvertResult]:
    """Converts to the other layout and back, into `folder`; requires the same bytes."""
    nvidias = (directory / "hf_quant_config.json").exists()
    layouts: Any = ("compressed-tensors", "modelopt") if nvidias else ("modelopt", "compressed-tensors")
    there = fourge.convert(str(directory), folder / "there", layout=layouts[0])
    back = fourge.convert(str(folder / "there"), folder / "back", layout=layouts[1])
    assert contents(folder / "back") == contents(directory)
    return there, back


@pytest.mark.parametrize(
    ("architecture", "scheme", "ignore", "changes"),
    [
        ("llama", "NVFP4", None, {}),
        ("llama", "NVFP4A16", None, {}),
        ("llama", "NVFP4", None, {"tie_word_embeddings": True}),
        ("llama", "NVFP4A16", ["lm_head", "re:.*self_attn.*"], {}),
        ("qwen2", "NVFP4A16", None, {}),
        ("qwen3", "NVFP4A16", None, {"tie_word_embeddings": True}),
    ],
)
def test_every_file_comes_back(
    architecture: str, scheme: str, ignore: Any, changes: Any, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    directory = quantized(architecture, scheme, ignore, **changes)
    there, back = there_and_back(directory, tmp_path)
    linears = 6 if ignore else 14
    assert (there.source_layout, there.layout, there.scheme) == ("compressed-tensors", "modelopt", scheme)
    assert (there.quantized_linears, there.global_scales) == (linears, linears * (2 if scheme == "NVFP4" else 1))
    assert not there.restored and back.restored and not there.reordered_shards and not there.continued
    stored = read(directory)
    lost = [n for n, t in stored.items() if n.endswith("global_scale") and 1 / (1 / np.float32(t)) != np.float32(t)]
    assert there.kept_scales == len(lost)


def test_what_another_tool_wrote_in_nvidias_layout_comes_back(nvidias: Path, tmp_path: Path) -> None:
    there, back = there_and_back(nvidias, tmp_path)
    assert there.kept_scales == 14, "layer 1 has 7 Linears with two scales each"
    assert there.kept_documents == ("config.json", "hf_quant_config.json")
    assert back.restored


def test_nvidias_layout_converts_to_what_verifies(nvidias: Path, pico: Callable[..., Path], tmp_path: Path) -> None:
    fourge.convert(str(nvidias), tmp_path / "out", layout="compressed-tensors")
    assert fourge.verify(tmp_path / "out", threads=1).passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens"], "the wildcard is spelled out"
    scales = {n: t for n, t in read(tmp_path / "out").items() if n.endswith("global_scale")}
    assert {(t.dtype, t.shape) for t in scales.values()} == {(torch.float32, (1,))}
    for name, scale in scales.items():
        assert scale.numpy() == np.float32(1) / (LEADS_BACK if ".0." in name else LEADS_NOWHERE), name


def test_scales_of_another_shape_come_back(nvidias: Path, tmp_path: Path) -> None:
    edit_tensors(nvidias, lambda t: t.update({n: v.reshape(1) for n, v in t.items() if n.endswith("input_scale")}))
    there, _ = there_and_back(nvidias, tmp_path)
    assert there.kept_scales == 14 + 7, "in layer 0 the scales of the inputs, in layer 1 all"


def test_an_older_export_without_quantization_config(nvidias: Path, tmp_path: Path) -> None:
    edit_json(nvidias / "config.json", lambda config: config.pop("quantization_config"))
    there_and_back(nvidias, tmp_path)


def test_scales_that_no_reciprocal_leads_back_to(ours: Path, tmp_path: Path) -> None:
    set_scales(ours, "global_scale", 1999.9998)
    there, _ = there_and_back(ours, tmp_path)
    assert there.kept_scales == there.global_scales == 28
    nearest = np.float32(1) / np.float32(1999.9998)
    stored = read(tmp_path / "there")
    assert all(stored[name].numpy() == nearest for name in stored if name.endswith(("_scale_2", "input_scale")))


def test_without_what_was_kept_the_scales_are_the_nearest(ours: Path, tmp_path: Path) -> None:
    set_scales(ours, "global_scale", 1999.9998)
    fourge.convert(str(ours), tmp_path / "there", layout="modelopt")
    (tmp_path / "there" / "fourge_convert.json").unlink()
    (tmp_path / "there" / "fourge.json").unlink()
    result = fourge.convert(str(tmp_path / "there"), tmp_path / "back", layout="compressed-tensors")
    assert not result.restored
    stored, back = read(ours), read(tmp_path / "back")
    assert stored.keys() == back.keys()
    for name, tensor in stored.items():
        if name.endswith("global_scale"):
            torch.testing.assert_close(back[name], tensor, rtol=2**-23, atol=0)
            assert not torch.equal(back[name], tensor)
        else:
            assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert fourge.verify(tmp_path / "back", threads=1).passed


def test_other_wording_comes_back(ours: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] = ["re:lm_head.*", "re:.*never_there"]
        config["quantization_config"]["version"] = "0.15.0"

    edit_json(ours / "config.json", change, indent=4)
    edit_json(ours / "model.safetensors.index.json", lambda index: index["metadata"].update(total_parameters=5))
    there, _ = there_and_back(ours, tmp_path)
    assert there.kept_documents == ("config.json", "model.safetensors.index.json")
    index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == 5


def test_a_checkpoint_of_one_file(ours: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in read(ours).items()}
    for path in [*ours.glob("*.safetensors"), ours / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, ours / "model.safetensors", metadata={"format": "pt"})
    there_and_back(ours, tmp_path)
    assert not (tmp_path / "there" / "model.safetensors.index.json").exists()


K, V = (f"{Q_PROJ.removesuffix('q_proj')}{name}.weight_packed" for name in ("k_proj", "v_proj"))


def rewrite_header(shard: Path, change: Callable[[dict[str, Any]], dict[str, Any]], separators: Any) -> None:
    """Changes the header and nothing else, padded as safetensors does."""
    raw = shard.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(change(json.loads(raw[8:begin])), separators=separators).encode()
    header += b" " * (-len(header) % 8)
    shard.write_bytes(len(header).to_bytes(8, "little") + header + raw[begin:])


def exchange(header: dict[str, Any]) -> dict[str, Any]:
    """The same bytes under each other's names: still in the order of the offsets, not of the names any more."""
    other = {K: V, V: K}
    return {other.get(name, name): entry for name, entry in header.items()}


@pytest.mark.parametrize(
    ("change", "separators"),
    [
        (lambda header: header, (", ", ": ")),
        (lambda header: header | {"__metadata__": {"origin": "a test", "format": "pt"}}, (",", ":")),
        (exchange, (",", ":")),
        (lambda header: header | {K: header[V], V: header[K]}, (",", ":")),
    ],
    ids=["spaces", "metadata", "names", "offsets"],
)
def test_a_header_in_another_order_is_told(change: Any, separators: Any, ours: Path, tmp_path: Path) -> None:
    shard = ours / "model-00002-of-00004.safetensors"
    rewrite_header(shard, change, separators)
    there = fourge.convert(str(ours), tmp_path / "there", layout="modelopt")
    assert there.reordered_shards == 1
    fourge.convert(str(tmp_path / "there"), tmp_path / "back", layout="compressed-tensors")
    before, after = load_file(shard), load_file(tmp_path / "back" / shard.name)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with safe_open(shard, "pt") as one, safe_open(tmp_path / "back" / shard.name, "pt") as other:
        assert one.metadata() == other.metadata()


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_names_dtypes_and_shapes_of_nvidias_layout(scheme: str, quantized: Callable[..., Path], tmp_path: Path) -> None:
    fourge.convert(str(quantized(scheme=scheme)), tmp_path / "there", layout="modelopt")
    tensors = {n: (t.dtype, tuple(t.shape)) for n, t in read(tmp_path / "there").items() if n.startswith(Q_PROJ)}
    expected: dict[str, Any] = {
        f"{Q_PROJ}.weight": (torch.uint8, (64, 32)),
        f"{Q_PROJ}.weight_scale": (torch.float8_e4m3fn, (64, 4)),
        f"{Q_PROJ}.weight_scale_2": (torch.float32, ()),
    }
    if scheme == "NVFP4":
        expected[f"{Q_PROJ}.input_scale"] = (torch.float32, ())
    assert tensors == expected


@pytest.mark.parametrize(("scheme", "algorithm"), [("NVFP4", "NVFP4"), ("NVFP4A16", "W4A16_NVFP4")])
@pytest.mark.parametrize("tied", [False, True])
def test_the_two_configs_of_nvidias_layout(
    scheme: str, algorithm: str, tied: bool, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    """Field for field what Model-Optimizer 0.47 writes for such a model."""
    fourge.convert(str(quantized(scheme=scheme, tie_word_embeddings=tied)), tmp_path / "there", layout="modelopt")
    excluded = ["lm_head", "model.embed_tokens"]
    assert json.loads((tmp_path / "there" / "hf_quant_config.json").read_text()) == {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": excluded,
        },
    }
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"weights": arguments, "targets": ["Linear"]}
    if scheme == "NVFP4":
        group["input_activations"] = arguments
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "config_groups": {"group_0": group},
        "ignore": excluded,
        "quant_algo": algorithm,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def test_unquantized_linears_are_excluded_by_name(quantized: Callable[..., Path], tmp_path: Path) -> None:
    directory = quantized("llama", "NVFP4A16", ["lm_head", "re:.*self_attn.*"])
    fourge.convert(str(directory), tmp_path / "there", layout="modelopt")
    stored = json.loads((tmp_path / "there" / "hf_quant_config.json").read_text())
    excluded = ["lm_head", "model.embed_tokens", *SELF_ATTENTION]
    assert stored["quantization"]["exclude_modules"] == excluded


def dequantized(tensors: dict[str, torch.Tensor], linear: str) -> np.ndarray:
    """NVIDIA's formula, in FP64: code times group scale times multiplier."""
    packed = tensors[f"{linear}.weight"].numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    scales = tensors[f"{linear}.weight_scale"].double().numpy().repeat(16, axis=1)
    return np.asarray(E2M1[codes] * scales * tensors[f"{linear}.weight_scale_2"].double().numpy())


def test_the_values_are_those_that_compressed_tensors_reads(quantized: Callable[..., Path], tmp_path: Path) -> None:
    fourge.convert(str(quantized()), tmp_path / "there", layout="modelopt")
    before, after = read(quantized()), read(tmp_path / "there")
    linears = [name.removesuffix(".weight_packed") for name in before if name.endswith(".weight_packed")]
    assert len(linears) == 14
    for linear in linears:
        packed, scale, divisor = (
            before[f"{linear}.{name}"] for name in ("weight_packed", "weight_scale", "weight_global_scale")
        )
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
        theirs = dequantize(codes, scale.float(), args=WEIGHTS, global_scale=divisor, dtype=torch.float32)
        # Theirs rounds to FP32 twice, and the multiplier was rounded once: half a unit in the last place each.
        np.testing.assert_allclose(dequantized(after, linear), theirs.double().numpy(), rtol=3 * 2**-24, atol=0)
        inverse = np.float32(1) / divisor.numpy()[0]
        assert after[f"{linear}.weight_scale_2"].numpy() == inverse, "what engines compute from the divisor"


def test_everything_else_is_copied(ours: Path, tmp_path: Path) -> None:
    (ours / "README.md").write_text("a card\n")
    (ours / "subfolder").mkdir()
    fourge.convert(str(ours), tmp_path / "there", layout="modelopt")
    before, after = contents(ours), contents(tmp_path / "there")
    assert after.keys() - before.keys() == {"hf_quant_config.json", "fourge_convert.json"}
    changed = {name for name in before if before[name] != after[name]}
    assert {name for name in changed if not name.endswith(".safetensors")} == {
        "config.json",
        "model.safetensors.index.json",
    }
    tensors, converted = read(ours), read(tmp_path / "there")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(tensors[name], converted[name])


def test_a_symlinked_snapshot_is_followed(ours: Path, tmp_path: Path) -> None:
    """In the hub cache every file is a link to a blob; the output has files."""
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    shutil.copytree(ours, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    fourge.convert(str(snapshot), tmp_path / "there", layout="modelopt")
    assert not any(path.is_symlink() for path in (tmp_path / "there").iterdir())
    back = fourge.convert(str(tmp_path / "there"), tmp_path / "back", layout="compressed-tensors")
    assert back.restored and contents(tmp_path / "back") == contents(ours)
