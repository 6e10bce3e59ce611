"""Scales of an FP8 KV cache between the layouts: other names, the same numbers, and the same bytes back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from both_layouts import contents, edit_json, edit_tensors, read

import fourge

SCALES = {f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in "kv"}
THEIR_NAMES = {name: name.replace("k_scale", "k_proj.k_scale").replace("v_scale", "v_proj.v_scale") for name in SCALES}


@pytest.fixture
def with_cache(pico: Callable[..., Path], tmp_path: Path) -> Path:
    """One of ours, without its job; may be written to."""
    data: Any = {"calibration": "random", "num_calibration_samples": 3, "num_probe_samples": 0, "max_seq_length": 12}
    fourge.quantize(str(pico()), tmp_path / "with", kv_cache_scheme="fp8", threads=1, **data)
    return tmp_path / "with"


def convert(source: Path, output: Path, layout: Any) -> fourge.ConvertResult:
    return fourge.convert(str(source), output, layout=layout)


def refuse(directory: Path, folder: Path) -> str:
    nvidias = (directory / "hf_quant_config.json").exists()
    with pytest.raises(fourge.InputError) as caught:
        convert(directory, folder / "refused", "compressed-tensors" if nvidias else "modelopt")
    assert "\n" not in str(caught.value) and not (folder / "refused").exists()
    return str(caught.value)


def test_there_and_back(with_cache: Path, tmp_path: Path) -> None:
    there = convert(with_cache, tmp_path / "there", "modelopt")
    assert there.kv_cache_scheme == "fp8" and there.global_scales == 28
    ours, theirs = read(with_cache), read(tmp_path / "there")
    assert ours.keys() & SCALES == SCALES and theirs.keys() & SCALES == set()
    for name, their_name in THEIR_NAMES.items():
        assert theirs[their_name].dtype == torch.float32 and theirs[their_name].shape == ()
        assert float(theirs[their_name]) == float(ours[name]), "a multiplier in both: no reciprocal"
    back = convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert back.kv_cache_scheme == "fp8"
    assert contents(tmp_path / "back") == contents(with_cache)


def test_their_config_says_so_twice(with_cache: Path, tmp_path: Path) -> None:
    """In the words of Model-Optimizer 0.47's own export."""
    convert(with_cache, tmp_path / "there", "modelopt")
    stored = json.loads((tmp_path / "there" / "hf_quant_config.json").read_text())
    assert stored["quantization"]["kv_cache_quant_algo"] == "FP8"
    config = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


def test_without_a_cache_neither_does(ours: Path, tmp_path: Path) -> None:
    assert convert(ours, tmp_path / "there", "modelopt").kv_cache_scheme is None
    stored = json.loads((tmp_path / "there" / "hf_quant_config.json").read_text())
    assert stored["quantization"]["kv_cache_quant_algo"] is None
    assert "kv_cache_scheme" not in json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_another_dtype_come_back_in_it(dtype: torch.dtype, with_cache: Path, tmp_path: Path) -> None:
    """As llm-compressor stores them; the other layout has FP32, which holds each of their values."""
    edit_tensors(with_cache, lambda t: t.update({name: t[name].to(dtype) for name in t if name in SCALES}))
    there = convert(with_cache, tmp_path / "there", "modelopt")
    assert there.kept_scales <= there.global_scales
    stored, theirs = read(with_cache), read(tmp_path / "there")
    for name, their_name in THEIR_NAMES.items():
        assert theirs[their_name].dtype == torch.float32 and float(theirs[their_name]) == float(stored[name])
    convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert contents(tmp_path / "back") == contents(with_cache)


def test_one_that_nvidia_made(with_cache: Path, tmp_path: Path) -> None:
    """Without what we keep for the way back, the checkpoint is one of theirs: it converts, verifies and returns."""
    convert(with_cache, tmp_path / "theirs", "modelopt")
    (tmp_path / "theirs" / "fourge_convert.json").unlink(missing_ok=True)
    (tmp_path / "theirs" / "fourge.json").unlink()
    convert(tmp_path / "theirs", tmp_path / "there", "compressed-tensors")
    assert fourge.verify(tmp_path / "there", threads=1).passed
    convert(tmp_path / "there", tmp_path / "back", "modelopt")
    assert contents(tmp_path / "back") == contents(tmp_path / "theirs")


# Bad input


def test_a_scale_changed_since_is_named(with_cache: Path, tmp_path: Path) -> None:
    edit_tensors(with_cache, lambda t: t.update({name: t[name].bfloat16() for name in t if name in SCALES}))
    convert(with_cache, tmp_path / "there", "modelopt")
    name = "model.layers.1.self_attn.v_proj.v_scale"
    edit_tensors(tmp_path / "there", lambda t: t.update({name: torch.tensor(0.5)}) if name in t else None)
    assert f"{name} was changed since" in refuse(tmp_path / "there", tmp_path)


@pytest.mark.parametrize("nvidias", [False, True])
def test_one_of_a_pair_is_missing(nvidias: bool, with_cache: Path, tmp_path: Path) -> None:
    directory, name = with_cache, "model.layers.1.self_attn.v_scale"
    if nvidias:
        directory, name = tmp_path / "there", THEIR_NAMES[name]
        convert(with_cache, directory, "modelopt")
        (directory / "fourge_convert.json").unlink(missing_ok=True)
    edit_tensors(directory, lambda t: t.pop(name, None))
    edit_json(directory / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))
    assert f"{name} is missing" in refuse(directory, tmp_path)


def test_no_scales_at_all(with_cache: Path, tmp_path: Path) -> None:
    """NVIDIA's `fp8_cast` recipes say FP8 and store none."""
    edit_tensors(with_cache, lambda t: [t.pop(name) for name in SCALES & t.keys()])
    index = with_cache / "model.safetensors.index.json"
    edit_json(index, lambda content: [content["weight_map"].pop(name) for name in SCALES])
    assert "no scales of it are there" in refuse(with_cache, tmp_path)


@pytest.mark.parametrize("new", [torch.ones(2), torch.ones(1, 1), torch.ones(1, dtype=torch.int32)])
def test_a_scale_that_is_not_one_number(new: torch.Tensor, with_cache: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_scale"
    edit_tensors(with_cache, lambda t: t.update({name: new}) if name in t else None)
    assert name in (line := refuse(with_cache, tmp_path)) and "expected one floating-point number" in line


@pytest.mark.parametrize("nvidias", [False, True])
def test_scales_that_the_config_does_not_call_for(nvidias: bool, with_cache: Path, tmp_path: Path) -> None:
    directory = with_cache
    if nvidias:
        directory = tmp_path / "there"
        convert(with_cache, directory, "modelopt")
        (directory / "fourge_convert.json").unlink(missing_ok=True)
        edit_json(directory / "hf_quant_config.json", lambda c: c["quantization"].update(kv_cache_quant_algo=None))
    else:
        edit_json(directory / "config.json", lambda c: c["quantization_config"].update(kv_cache_scheme=None))
    assert "k_scale" in (line := refuse(directory, tmp_path)) and "cannot be converted" in line
