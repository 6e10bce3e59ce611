"""The order of calls that a power cut tests, and that a failure leaves the old file and nothing else."""

import json
import os
import stat
from pathlib import Path

import pytest

from fourge.checkpoint.durable import copy_file, fsync_directory, replace_durably, write_json


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was forced to disk and renamed, in order: `fsync NAME`, `rename NAME`."""
    recorded: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        recorded.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        recorded.append(f"rename {Path(source).name} {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return recorded


def test_file_then_rename_then_folder(tmp_path: Path, events: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "shard.tmp").write_bytes(b"new")
    (out / "shard").write_bytes(b"old")
    replace_durably(tmp_path / "shard.tmp", out / "shard")
    assert events == ["fsync shard.tmp", "rename shard.tmp shard", "fsync out"]
    assert (out / "shard").read_bytes() == b"new"
    assert not (tmp_path / "shard.tmp").exists()


def test_json(tmp_path: Path, events: list[str]) -> None:
    path = tmp_path / "job.json"
    write_json(path, {"b": [1], "a": {"d": None, "c": "é"}})
    assert path.read_text() == ('{\n  "a": {\n    "c": "\\u00e9",\n    "d": null\n  },\n  "b": [\n    1\n  ]\n}\n')
    assert events == ["fsync .job.json.tmp", "rename .job.json.tmp job.json", f"fsync {tmp_path.name}"]


def test_copy_follows_links_and_leaves_no_temporary(tmp_path: Path, events: list[str]) -> None:
    (tmp_path / "blob").write_bytes(b"tokens")
    (tmp_path / "blob").chmod(0o400)
    (tmp_path / "link").symlink_to("blob")
    copy_file(tmp_path / "link", tmp_path / "tokenizer.json")
    copy = tmp_path / "tokenizer.json"
    assert copy.read_bytes() == b"tokens"
    assert not copy.is_symlink()
    assert copy.stat().st_mode & stat.S_IWUSR  # the cache's read-only blobs do not make read-only copies
    assert events[0].startswith("fsync .tokenizer.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blob", "link", "tokenizer.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "job.json"
    write_json(path, {"layer": 1})

    def fail(*arguments: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="on fire"):
        write_json(path, {"layer": 2})
    assert json.loads(path.read_text()) == {"layer": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    write_json(path, {"layer": 1})
    with pytest.raises(TypeError):
        write_json(path, {"layer": object()})
    assert json.loads(path.read_text()) == {"layer": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_missing_source_leaves_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy_file(tmp_path / "none", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_only_folders_are_forced_as_folders(tmp_path: Path) -> None:
    fsync_directory(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        fsync_directory(tmp_path / "file")
