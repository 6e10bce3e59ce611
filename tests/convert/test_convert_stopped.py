"""A conversion stopped anywhere: no finished-looking output, and the same command ends with the same bytes."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from both_layouts import contents

import fourge
from fourge.checkpoint import durable
from fourge.convert import MARKER


class Stopped(BaseException):
    """What a signal does: no handler for errors catches it."""


@pytest.fixture
def whole(ours: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of a conversion that nothing stopped."""
    fourge.convert(str(ours), tmp_path / "whole", layout="modelopt")
    return contents(tmp_path / "whole")


def stops(monkeypatch: pytest.MonkeyPatch, *, after: bool) -> Iterator[pytest.MonkeyPatch]:
    """Patches that stop a run before, or just after, its first rename of a file, its second, …"""
    replace = durable.replace_durably
    for last in itertools.count():
        with monkeypatch.context() as patched:
            count = itertools.count()

            def stopping(temporary: Path, final: Path, count: Iterator[int] = count, last: int = last) -> None:
                here = next(count) == last
                if here and not after:
                    raise Stopped
                replace(temporary, final)
                if here:
                    raise Stopped

            patched.setattr(durable, "replace_durably", stopping)
            yield patched


@pytest.mark.parametrize("after", [False, True])
def test_stopped_at_every_rename(
    after: bool, whole: dict[str, bytes], ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0
    for tried, patched in enumerate(stops(monkeypatch, after=after)):
        output = tmp_path / f"stopped at {tried}"
        try:
            fourge.convert(str(ours), output, layout="modelopt")
        except Stopped:
            left = contents(output)
            assert MARKER in left or not left, "what is there says that it is not finished"
            index = "model.safetensors.index.json"
            assert index not in left or len(left) == len(whole) + 1, "the index comes last"
            patched.undo()
            result = fourge.convert(str(ours), output, layout="modelopt")
            assert result.continued == bool(left)
            assert contents(output) == whole
        else:
            break
    assert tried == len(whole) + 1, "every file was one rename, and the marker"


def test_finished_shards_are_not_written_again(
    whole: dict[str, bytes], ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, replace = tmp_path / "out", durable.replace_durably

    def stopping(temporary: Path, final: Path) -> None:
        if final.name == "config.json":
            raise Stopped
        replace(temporary, final)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(durable, "replace_durably", stopping)
        fourge.convert(str(ours), output, layout="modelopt")
    before = {path.name: path.stat().st_ino for path in output.glob("*.safetensors")}
    assert len(before) == 4
    assert fourge.convert(str(ours), output, layout="modelopt").continued
    assert {path.name: path.stat().st_ino for path in output.glob("*.safetensors")} == before
    assert contents(output) == whole


def test_leftovers_of_a_killed_process_do_not_stay(whole: dict[str, bytes], ours: Path, tmp_path: Path) -> None:
    """A process that is killed removes nothing: the file that it was writing stays, under its temporary name."""
    output = tmp_path / "out"
    fourge.convert(str(ours), output, layout="modelopt")
    (output / "model-00003-of-00004.safetensors").rename(output / ".model-00003-of-00004.safetensors.tmp")
    (output / "model.safetensors.index.json").unlink()
    (output / MARKER).write_bytes(marker_of(ours, tmp_path))
    assert fourge.convert(str(ours), output, layout="modelopt").continued
    assert contents(output) == whole


def marker_of(ours: Path, tmp_path: Path) -> bytes:
    """The marker that a conversion of `ours` puts down."""
    output = tmp_path / "marked"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr("fourge.checkpoint.writer.write_safetensors", stop)
        fourge.convert(str(ours), output, layout="modelopt")
    return (output / MARKER).read_bytes()


def stop(*args: object) -> None:
    raise Stopped


def test_a_changed_source_is_not_mixed_in(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_bytes(marker_of(ours, tmp_path))
    config = ours / "config.json"
    config.write_text(config.read_text().replace("\n", "\n "))
    with pytest.raises(fourge.InputError, match="an unfinished conversion of something else"):
        fourge.convert(str(ours), tmp_path / "out", layout="modelopt")
