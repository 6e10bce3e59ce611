"""`fourge.json` names every file on both sides by its digest, and `fourge verify` holds the files against it."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import failed, flip_bit, quantize
from safetensors.numpy import load_file

import fourge

INDEX = "model.safetensors.index.json"
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def source(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a card, and with what another quantization published beside its weights."""
    directory = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(pico(), directory)
    for name in ("README.md", "fourge.json", "fourge.html", "model.sig", "fourge.cdx.json"):
        (directory / name).write_text(f"the source's {name}")
    return directory


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smoothed, so that without its job only `fourge.json` knows what the source's weights were multiplied by."""
    output = quantize(source, tmp_path_factory.mktemp("finished") / "out", smooth=True)
    assert any(group["kept"] for layer in record(output)["smoothing"] for group in layer.values())
    return output


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """As it would be downloaded: without the job."""
    return Path(shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns(".fourge")))


def record(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "fourge.json").read_text())
    return content


def facts(paths: list[Path]) -> dict[str, dict[str, Any]]:
    return {p.name: {"size": len(p.read_bytes()), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths}


def test_every_file_of_both_sides_is_there(source: Path, finished: Path) -> None:
    stored = record(finished)
    about_one_directory = {"fourge.json", "fourge.html", "model.sig", "fourge.cdx.json"}
    theirs = [path for path in source.iterdir() if path.name not in about_one_directory]
    ours = [path for path in finished.iterdir() if path.is_file() and path.name not in ("fourge.json", "README.md")]
    assert stored["source"]["files"] == facts(theirs)
    assert stored["output"]["files"] == facts(ours)
    assert INDEX in stored["output"]["files"]


def test_what_another_quantization_published_is_not_carried_over(finished: Path) -> None:
    assert not {"fourge.html", "model.sig", "fourge.cdx.json"} & {path.name for path in finished.iterdir()}
    assert "the source's" in (finished / "README.md").read_text()


def test_settings_versions_events_and_the_digest_of_the_tokens(source: Path, finished: Path) -> None:
    stored, job = record(finished), json.loads((finished / ".fourge" / "job.json").read_text())
    assert stored["settings"] == job["settings"]
    assert stored["source"]["name"] == str(source)
    assert (stored["source"]["repository"], stored["source"]["revision"]) == (None, None)
    for package in ("torch", "transformers", "compressed-tensors"):
        assert stored["versions"][package].partition("+")[0] == version(package).partition("+")[0]
    assert stored["versions"]["fourge"] == fourge.__version__
    assert (stored["events"], stored["dropped_tensors"]) == (job["result"]["events"], [])
    tokens = load_file(finished / ".fourge" / "tokens.safetensors")
    digest = hashlib.sha256()
    for part in ("lengths", "tokens"):
        values = tokens[f"calibration.{part}"].astype(np.int64).tolist()
        digest.update(struct.pack(f"<{len(values)}i", *values))
    assert stored["data"]["calibration"]["sha256"] == digest.hexdigest()


def test_a_snapshot_of_the_hub_cache_is_named_by_repository_and_commit(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / COMMIT
    shutil.copytree(pico(), snapshot)
    stored = record(quantize(snapshot, tmp_path / "out"))
    assert stored["source"]["repository"] == "some-org/some-model"
    assert stored["source"]["revision"] == COMMIT


def test_the_good_one_passes_with_and_without_its_job(source: Path, finished: Path, copy: Path) -> None:
    for output in (finished, copy):
        report = fourge.verify(output, source=str(source), threads=1)
        assert report.passed
        (check,) = [check for check in report.checks if check.name == "provenance"]
        assert check.status == "passed" and "of the source's 7" in check.detail


def test_a_card_a_page_and_a_signature_may_come_later(copy: Path) -> None:
    for name in ("README.md", "fourge.html", "model.sig", "fourge.cdx.json", "layers.png"):
        (copy / name).write_text("new")
    assert not failed(copy)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", INDEX, "model-00002-of-00004.safetensors", "LICENSE"]
)
def test_a_flipped_bit_of_any_file_is_found_and_named(name: str, copy: Path) -> None:
    # Bit 0 of the last byte: the newline of a JSON file becomes a vertical tab, which JSON does not take.
    flip_bit(copy / name, -2 if name.endswith(".json") else -1)
    found = failed(copy)
    if "provenance" in found:
        assert name in found["provenance"][0] and "SHA-256" in found["provenance"][0]
    else:
        assert name in found["files"][0]


def test_a_missing_and_an_extra_file(copy: Path) -> None:
    (copy / "LICENSE").unlink()
    content = json.loads((copy / "fourge.json").read_text())
    del content["output"]["files"]["model-00003-of-00004.safetensors"]
    (copy / "fourge.json").write_text(json.dumps(content))
    found = failed(copy)
    assert list(found) == ["provenance"]
    assert "model-00003-of-00004.safetensors: weights that fourge.json does not name" in found["provenance"]
    assert any("LICENSE: missing" in failure for failure in found["provenance"])


def test_a_job_that_committed_other_bytes(finished: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "copy"))
    content = record(output)
    content["output"]["files"]["model-00001-of-00004.safetensors"]["sha256"] = "0" * 64
    (output / "fourge.json").write_text(json.dumps(content))
    (failure,) = failed(output)["provenance"]
    assert "model-00001-of-00004.safetensors" in failure


def test_another_source(copy: Path, source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "README.md").write_text("a card may change")
    assert "provenance" not in failed(copy, source=str(other))
    (other / "LICENSE").unlink()
    flip_bit(other / "model.safetensors")
    (other / "added.txt").write_text("new")
    failures = failed(copy, source=str(other))["provenance"]
    assert [failure.partition(" which")[0].partition(" is ")[0] for failure in failures] == [
        *("the source lacks LICENSE,", "the source's added.txt was not there when this was made"),
        "the source's model.safetensors",
    ]


@pytest.mark.parametrize("damage", ["{", "{}", '{"output": {"files": {"a": 1}}, "source": {"files": {}}}'])
def test_a_damaged_record_is_a_failure_and_not_a_crash(damage: str, copy: Path) -> None:
    (copy / "fourge.json").write_text(damage)
    assert "fourge.json" in failed(copy)["provenance"][0]


def test_a_record_that_names_files_outside(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    content = record(copy)
    content["output"]["files"]["../secret"] = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (copy / "fourge.json").write_text(json.dumps(content))
    (failure,) = failed(copy)["provenance"]
    assert "out of the directory" in failure


def test_a_conversion_keeps_it_and_the_way_back_passes(copy: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    fourge.convert(str(copy), there, layout="modelopt")
    assert (there / "fourge.json").read_bytes() == (copy / "fourge.json").read_bytes()
    fourge.convert(str(there), back, layout="compressed-tensors")
    report = fourge.verify(back, threads=1)
    assert report.passed
    assert {check.name: check.status for check in report.checks}["provenance"] == "passed"
    (skipped,) = [check for check in fourge.verify(there, threads=1).checks if check.name == "provenance"]
    assert skipped.status == "skipped" and "converted from" in skipped.detail
