"""`fourge convert` as scripts and people see it."""

import json
from pathlib import Path

from both_layouts import set_scales
from typer.testing import CliRunner

from fourge.cli import app


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_json(ours: Path, tmp_path: Path) -> None:
    code, out, err = run(ours, "-o", tmp_path / "out", "--layout", "modelopt", "--json")
    result = json.loads(out)
    assert code == 0
    assert result.pop("seconds") >= 0
    shards = (tmp_path / "out").glob("*.safetensors")
    assert result == {
        "output": str(tmp_path / "out"),
        "source_layout": "compressed-tensors",
        "layout": "modelopt",
        "scheme": "NVFP4",
        "kv_cache_scheme": None,
        "quantized_linears": 14,
        "global_scales": 28,
        "kept_scales": len(json.loads((tmp_path / "out" / "fourge_convert.json").read_text())["scales"]),
        "kept_documents": ["config.json"],
        "restored": False,
        "reordered_shards": 0,
        "output_bytes": sum(path.stat().st_size for path in shards),
        "continued": False,
    }
    assert "convert 4/4" in err, "progress goes to standard error"


def test_the_table_for_people(ours: Path, tmp_path: Path) -> None:
    set_scales(ours, "input_global_scale", 1999.9998)
    set_scales(ours, "weight_global_scale", 2.0)
    code, out, _ = run(ours, "-o", tmp_path / "there", "--layout", "modelopt")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert lines[1:3] == ["layout       modelopt, from compressed-tensors", "quantized    14 Linears, NVFP4"]
    way_back = "way back     in fourge_convert.json: 14 of 28 global scales, whose reciprocals do not lead back"
    assert f"{way_back}, config.json" in lines
    code, out, _ = run(tmp_path / "there", "-o", tmp_path / "back", "--layout", "compressed-tensors")
    assert code == 0
    assert "  restored     scales and JSON files of what it was converted from" in out.splitlines()


def test_help_names_both_layouts() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "modelopt" in out and "compressed-tensors" in out
