"""`fourge sbom` writes a bill of materials that CycloneDX's own schema takes, with the digests of the very files."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished import failed, quantize, with_card

import fourge
from fourge import InputError


@pytest.fixture(scope="module")
def finished(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = pico()
    return source, quantize(source, tmp_path_factory.mktemp("finished") / "out", num_probe_samples=2)


@pytest.fixture
def output(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    return with_card(finished[1], tmp_path / "Pico-NVFP4")


def written(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(fourge.sbom(output).sbom.read_text())
    return content


def digests(components: list[dict[str, Any]]) -> dict[str, str]:
    return {component["name"]: component["hashes"][0]["content"] for component in components}


def test_it_is_cyclonedx(output: Path) -> None:
    pytest.importorskip("jsonschema", reason="cyclonedx-python-lib[json-validation] is not installed")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    fourge.sbom(output)
    text = (output / "fourge.cdx.json").read_text()
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace("machine-learning-model", "model-of-mine")) is not None


def test_the_model_its_files_its_source_and_its_data(output: Path, finished: tuple[Path, Path]) -> None:
    source, content = finished[0], written(output)
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    model = content["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "Pico-NVFP4")
    for name, digest in digests(model["components"]).items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in output.glob("*.safetensors")} <= digests(model["components"]).keys()
    assert model["hashes"][0]["content"] == hashlib.sha256((output / "fourge.json").read_bytes()).hexdigest()
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["type"] == "machine-learning-model"
    assert digests(ancestor["components"]).keys() == {path.name for path in source.iterdir()}
    for name, digest in digests(ancestor["components"]).items():
        assert hashlib.sha256((source / name).read_bytes()).hexdigest() == digest
    data = json.loads((output / ".fourge" / "job.json").read_text())["result"]["data"]
    assert {component["bom-ref"]: component["hashes"][0]["content"] for component in content["components"]} == {
        f"data:{role}": data[role]["sha256"]
        for role in ("calibration", "validation", "probe")
        if data[role]["sequences"]
    }
    assert {component["type"] for component in content["components"]} == {"data"}
    tools = {tool["name"]: tool["version"] for tool in content["metadata"]["tools"]["components"]}
    assert tools["fourge"] == fourge.__version__ and {"torch", "transformers", "compressed-tensors"} <= tools.keys()


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", [{"license": {"id": "Apache-2.0"}}]),
        ("license: other\nlicense_name: house-rules", [{"license": {"name": "house-rules"}}]),
        ("tags: [a]", None),
    ],
)
def test_the_licence_is_the_card_s(front: str, expected: Any, output: Path) -> None:
    (output / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    model = written(output)["metadata"]["component"]
    found = model.get("licenses")
    assert (
        found and [{"license": {k: v for k, v in entry["license"].items() if k in ("id", "name")}} for entry in found]
    ) == expected


def test_equal_files_give_equal_bytes_and_no_path_of_this_machine(output: Path, finished: tuple[Path, Path]) -> None:
    first = fourge.sbom(output).sbom.read_bytes()
    assert fourge.sbom(output).sbom.read_bytes() == first
    assert str(finished[0].parent).encode() not in first
    assert not failed(output)


def test_without_a_record(output: Path) -> None:
    (output / "fourge.json").write_text("{}")
    with pytest.raises(InputError, match=r"fourge\.json: damaged"):
        fourge.sbom(output)
    (output / "fourge.json").unlink()
    with pytest.raises(InputError, match=r"fourge\.json is missing"):
        fourge.sbom(output)


def test_without_the_library_the_extra_is_named(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedx.model.bom", None)
    with pytest.raises(InputError, match=r"pip install 'fourge\[sbom\]'"):
        fourge.sbom(output)
