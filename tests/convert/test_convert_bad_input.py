"""What cannot be converted: one line that names it and the mend, exit code 2, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from both_layouts import contents, edit_json, edit_tensors, set_scales
from typer.testing import CliRunner

import fourge
from fourge.cli import app
from fourge.convert import MARKER

Q_PROJ = "model.layers.1.self_attn.q_proj"
OTHER = {"ours": "modelopt", "nvidias": "compressed-tensors"}


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """`refuse(directory, layout)`: converts, requires a refusal that leaves nothing, returns its line."""

    def run(directory: Path | str, layout: str | None = None) -> str:
        output = tmp_path / "out"
        layout = layout or OTHER[Path(directory).name]
        result = CliRunner().invoke(app, ["convert", str(directory), "-o", str(output), "--layout", layout])
        assert result.exit_code == 2, result.output
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fourge: "), result.stderr
        assert not output.exists()
        return lines[0]

    return run


def test_an_unquantized_model(pico: Callable[..., Path], refuse: Callable[..., str]) -> None:
    line = refuse(pico(), "modelopt")
    assert "config.json" in line and "fourge quantize" in line


def test_no_such_directory(tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "no such directory" in refuse(str(tmp_path / "no where"), "modelopt")


@pytest.mark.parametrize(("name", "layout"), [("ours", "compressed-tensors"), ("nvidias", "modelopt")])
def test_already_in_that_layout(
    name: str, layout: str, request: pytest.FixtureRequest, refuse: Callable[..., str]
) -> None:
    assert f"in the {layout} layout already" in refuse(request.getfixturevalue(name), layout)


def test_an_unknown_layout(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(fourge.InputError, match="--layout gguf: known are compressed-tensors, modelopt"):
        fourge.convert(str(ours), tmp_path / "out", layout="gguf")  # type: ignore[arg-type]
    arguments = ["convert", str(ours), "-o", str(tmp_path / "out"), "--layout", "gguf"]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["a file in it", "a file itself", "another conversion", "the source"])
def test_an_output_that_is_taken(what: str, ours: Path, tmp_path: Path) -> None:
    output, mend = tmp_path / "out", "is not empty; name a new directory"
    if what == "a file in it":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    elif what == "a file itself":
        output.write_text("mine")
        mend = "is a file"
    elif what == "another conversion":
        output.mkdir()
        (output / MARKER).write_text(json.dumps({"source": "another"}))
        mend = "an unfinished conversion of something else"
    else:
        output = ours
    before = contents(output) if output.is_dir() else output.read_bytes()
    with pytest.raises(fourge.InputError, match=mend):
        fourge.convert(str(ours), output, layout="modelopt")
    assert (contents(output) if output.is_dir() else output.read_bytes()) == before


def test_an_empty_output_is_taken(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert fourge.convert(str(ours), tmp_path / "out", layout="modelopt").output_bytes > 0


def test_too_little_room(ours: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(ours)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "of disk are needed, 1.0 kB are free" in refuse(ours)


def test_a_parent_that_is_a_file(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(fourge.InputError, match="cannot be written to"):
        fourge.convert(str(ours), tmp_path / "file" / "out", layout="modelopt")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_algo": "FP8"}, "quant_algo is 'FP8', known are NVFP4, W4A16_NVFP4"),
        ({"quant_algo": "MIXED_PRECISION"}, "quant_algo is 'MIXED_PRECISION'"),
        ({"quant_algo": None}, "quant_algo is None"),
        ({"group_size": 32}, "group_size is 32, NVFP4 has 16"),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo is 'NVFP4', known is FP8"),
        ({"exclude_modules": "lm_head"}, "exclude_modules is not a list"),
    ],
)
def test_what_nvidias_config_says(
    change: dict[str, Any], expected: str, nvidias: Path, refuse: Callable[..., str]
) -> None:
    edit_json(nvidias / "hf_quant_config.json", lambda content: content["quantization"].update(change))
    line = refuse(nvidias)
    assert expected in line and "hf_quant_config.json" in line


def test_nvidias_config_without_its_part(nvidias: Path, refuse: Callable[..., str]) -> None:
    edit_json(nvidias / "hf_quant_config.json", lambda content: content.pop("quantization"))
    assert 'no object "quantization"' in refuse(nvidias)


def test_nvidias_config_is_missing(nvidias: Path, refuse: Callable[..., str]) -> None:
    (nvidias / "hf_quant_config.json").unlink()
    assert "hf_quant_config.json: missing" in refuse(nvidias)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config: config.update(quant_method="gptq"), "quant_method is 'gptq'"),
        (lambda config: config.update(format="pack-quantized"), "format is 'pack-quantized'"),
        (lambda config: config.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme.strategy is None"),
        (lambda config: config.pop("config_groups"), "config_groups"),
    ],
)
def test_what_our_config_says(change: Any, expected: str, ours: Path, refuse: Callable[..., str]) -> None:
    edit_json(ours / "config.json", lambda content: change(content["quantization_config"]))
    line = refuse(ours)
    assert expected in line and "config.json" in line


def test_both_layouts_at_once(ours: Path, refuse: Callable[..., str]) -> None:
    (ours / "hf_quant_config.json").write_text("{}")
    assert "hf_quant_config.json: does not belong to a checkpoint of compressed-tensors; remove it" in refuse(ours)


def set_to(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    """Puts `tensor` in the place of `name`, where that is or where its neighbours are; None removes it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            tensors.pop(name, None)
        elif any(other.startswith(name.rpartition(".")[0]) for other in tensors):
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("suffix", "tensor", "expected"),
    [
        ("weight_scale_2", None, "is missing, NVFP4 calls for it"),
        ("input_scale", None, "is missing, NVFP4 calls for it"),
        ("weight_scale", None, "is missing, NVFP4 calls for it"),
        ("weight_scale_2", torch.ones((), dtype=torch.float64), "is F64 [], expected F32 []"),
        ("weight_scale_2", torch.ones(2), "is F32 [2], expected F32 []"),
        ("weight_scale", torch.ones(64, 5).to(torch.float8_e4m3fn), "is F8_E4M3 [64, 5], expected F8_E4M3 [64, 4]"),
        ("weight", torch.zeros(64, 30, dtype=torch.uint8), "has shape [64, 30]"),
        ("weight_scale_2", torch.tensor(0.0), "is 0.0, which FP32 cannot invert"),
        ("weight_scale_2", torch.tensor(-1.0), "is -1.0, which FP32 cannot invert"),
        ("input_scale", torch.tensor(float("nan")), "is nan, which FP32 cannot invert"),
        ("input_scale", torch.tensor(1e-39), "which FP32 cannot invert"),
        ("input_scale", torch.tensor(1e38), "which FP32 cannot invert"),  # the reciprocal is subnormal
        ("pre_quant_scale", torch.ones(64), "is not part of a Linear in NVFP4"),
        ("k_scale", torch.ones(()), "is not part of a Linear in NVFP4"),
    ],
)
def test_tensors_of_a_linear(
    suffix: str, tensor: torch.Tensor | None, expected: str, nvidias: Path, refuse: Callable[..., str]
) -> None:
    edit_tensors(nvidias, set_to(f"{Q_PROJ}.{suffix}", tensor))
    line = refuse(nvidias)
    assert expected in line and f"{Q_PROJ}.{suffix}" in line


def test_a_scale_of_a_linear_in_another_format(nvidias: Path, refuse: Callable[..., str]) -> None:
    edit_tensors(nvidias, set_to(f"{Q_PROJ}.weight", torch.ones(64, 64, dtype=torch.bfloat16)))
    assert f"{Q_PROJ}.input_scale belongs to no Linear in NVFP4" in refuse(nvidias)


def test_nothing_is_quantized_after_all(nvidias: Path, refuse: Callable[..., str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers")]:
            del tensors[name]

    edit_tensors(nvidias, change)
    assert "no Linear is quantized" in refuse(nvidias)


@pytest.fixture
def there(ours: Path, tmp_path: Path) -> Path:
    """`ours` converted, with scales that the way back needs."""
    set_scales(ours, "global_scale", 1999.9998)
    return fourge.convert(str(ours), tmp_path / "there", layout="modelopt").output


def change_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: torch.tensor(0.5) for name in tensors if name == f"{Q_PROJ}.weight_scale_2"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: edit_json(d / "config.json", lambda c: c.update(rope_theta=1)), "config.json was changed since"),
        (lambda d: edit_tensors(d, change_scale), f"{Q_PROJ}.weight_scale_2 was changed since"),
        (
            lambda d: edit_json(d / "fourge_convert.json", lambda c: c["documents"].update({"../stolen": "x"})),
            "names ../stolen, which is no file of the compressed-tensors layout",
        ),
        (
            lambda d: edit_json(d / "fourge_convert.json", lambda c: c["scales"].update({"lm_head.scale": [1.0]})),
            "names lm_head.scale, which this checkpoint has not",
        ),
        (lambda d: edit_json(d / "fourge_convert.json", lambda c: c.update(layout="x")), "leads to layout 'x'"),
        (lambda d: edit_json(d / "fourge_convert.json", lambda c: c.pop("scales")), "damaged (KeyError('scales'))"),
        (lambda d: edit_json(d / "fourge_convert.json", lambda c: c["scales"].update(a=[1, 2])), "is not one number"),
        (lambda d: edit_json(d / "fourge_convert.json", lambda c: c.update(documents=[])), "damaged"),
        (lambda d: edit_json(d / "fourge_convert.json", lambda c: c["documents"].update(a=1)), "damaged"),
    ],
)
def test_a_way_back_that_does_not_fit(
    change: Callable[[Path], object], expected: str, there: Path, refuse: Callable[..., str]
) -> None:
    """Nothing is made up: the line says what is wrong and that the conversion works without the file."""
    change(there)
    line = refuse(there, "compressed-tensors")
    assert expected in line and "delete fourge_convert.json to convert what is there now" in line


def test_a_way_back_that_is_not_json(there: Path, refuse: Callable[..., str]) -> None:
    (there / "fourge_convert.json").write_text("{")
    assert "fourge_convert.json is not valid JSON" in refuse(there, "compressed-tensors")


def test_a_way_back_that_leads_out_of_the_directory(there: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (there / "fourge_convert.json").rename(tmp_path / "elsewhere.json")
    (there / "fourge_convert.json").symlink_to(tmp_path / "elsewhere.json")
    assert "a symlink out of the directory" in refuse(there, "compressed-tensors")
