"""The job directory: who may take it, what makes it another job, what damage is noticed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourge
import fourge.walk.job
from fourge.errors import InputError
from fourge.walk.job import FOLDER, INDEX, Job

OPTIONS: dict[str, Any] = {
    "method": "max",
    "calibration": "random",
    "num_calibration_samples": 3,
    "num_probe_samples": 2,
    "max_seq_length": 12,
    "threads": 1,
}


class StoppedError(Exception):
    """Raised in the middle of a run."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Makes the commit of step `steps` fail before it has done anything."""
    commit = Job.commit

    def stopping(self: Job, record: Any) -> None:
        if self.next_step == steps:
            raise StoppedError
        commit(self, record)

    monkeypatch.setattr(Job, "commit", stopping)


@pytest.fixture
def stopped(pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of which two steps of four are committed."""
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_after(patch, 2)
        fourge.quantize(str(pico()), str(tmp_path / "out"), **OPTIONS)
    return tmp_path / "out"


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_second_process_is_refused(stopped: Path, pico: Callable[..., Path]) -> None:
    holder = f"import fcntl, sys; f = open({str(stopped / FOLDER / 'lock')!r}, 'r+'); fcntl.flock(f, fcntl.LOCK_EX); "
    holder += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        with pytest.raises(InputError, match="another process"):
            fourge.quantize(str(pico()), stopped, **OPTIONS)
        process.stdin.close()
    assert fourge.quantize(str(pico()), stopped, **OPTIONS).continued


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("seed", {"seed": 1}),
        ("input_headroom", {"input_headroom": 1.0}),
        ("max_seq_length", {"max_seq_length": 10}),
        ("scheme", {"scheme": "NVFP4A16"}),
        ("ignore", {"ignore": ["lm_head", "re:.*o_proj"]}),
        ("micro_batch_tokens", {"micro_batch_tokens": 7}),
        ("compute_dtype", {"compute_dtype": "bfloat16"}),
    ],
)
def test_other_settings_are_another_job(
    stopped: Path, pico: Callable[..., Path], key: str, change: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=f"begun with {key} = "):
        fourge.quantize(str(pico()), stopped, **(OPTIONS | change))


def test_another_source_is_another_job(stopped: Path, pico: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="begun with source = "):
        fourge.quantize(str(pico(rope_theta=5000.0)), stopped, **OPTIONS)


def test_threads_may_differ_and_that_is_recorded(stopped: Path, pico: Callable[..., Path]) -> None:
    assert fourge.quantize(str(pico()), stopped, **(OPTIONS | {"threads": 2})).continued
    events = json.loads((stopped / FOLDER / "job.json").read_text())["events"]
    assert [(event["setting"], event["before"], event["now"]) for event in events] == [("threads", 1, 2)]


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"])
def test_a_flipped_bit_in_a_committed_shard_is_named(stopped: Path, pico: Callable[..., Path], name: str) -> None:
    flip_bit(stopped / name, -5)
    with pytest.raises(InputError, match=f"{name} is not what was committed.*--restart"):
        fourge.quantize(str(pico()), stopped, **OPTIONS)
    assert fourge.quantize(str(pico()), stopped, restart=True, **OPTIONS).continued is False


def test_damaged_hidden_states_are_named(stopped: Path, pico: Callable[..., Path]) -> None:
    (hidden,) = (stopped / FOLDER).glob("hidden-*.bin")
    whole = hidden.read_bytes()
    flip_bit(hidden, 1234)
    with pytest.raises(InputError, match=f"{hidden.name} is not what was committed"):
        fourge.quantize(str(pico()), stopped, **OPTIONS)
    hidden.write_bytes(whole[:-64])
    with pytest.raises(InputError, match=f"{hidden.name} has {len(whole) - 64} bytes, {len(whole)} were committed"):
        fourge.quantize(str(pico()), stopped, **OPTIONS)
    hidden.unlink()
    with pytest.raises(InputError, match="is gone"):
        fourge.quantize(str(pico()), stopped, **OPTIONS)
    hidden.write_bytes(whole)
    assert fourge.quantize(str(pico()), stopped, **OPTIONS).continued


def test_damaged_tokens_are_named(stopped: Path, pico: Callable[..., Path]) -> None:
    flip_bit(stopped / FOLDER / "tokens.safetensors", -5)
    with pytest.raises(InputError, match=r"tokens\.safetensors"):
        fourge.quantize(str(pico()), stopped, **OPTIONS)


def test_a_damaged_manifest_is_named(stopped: Path, pico: Callable[..., Path]) -> None:
    manifest = stopped / FOLDER / "job.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(InputError, match=r"job.json is damaged.*--restart"):
        fourge.quantize(str(pico()), stopped, **OPTIONS)


def test_a_full_disk_in_the_middle_loses_nothing(
    stopped: Path, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard's writer meets ENOSPC halfway; the same command goes on once there is room."""
    import fourge.walk.steps
    from fourge.checkpoint.writer import write_safetensors

    before = (stopped / FOLDER / "job.json").read_bytes()

    def full(path: Path, entries: Any) -> Any:
        path.write_bytes(b"half a shard")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(fourge.walk.steps, "write_safetensors", full)
        with pytest.raises(InputError, match=r"No space left on device.*continue"):
            fourge.quantize(str(pico()), stopped, **OPTIONS)
    assert (stopped / FOLDER / "job.json").read_bytes() == before
    assert fourge.walk.steps.write_safetensors is write_safetensors
    fourge.quantize(str(pico()), stopped, **OPTIONS)
    whole = tmp_path / "whole"
    fourge.quantize(str(pico()), whole, **OPTIONS)
    for path in whole.glob("*"):
        if path.is_file():
            assert (stopped / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_finished_job_is_left_as_it_is(stopped: Path, pico: Callable[..., Path]) -> None:
    first = fourge.quantize(str(pico()), stopped, **OPTIONS)
    times = {path: path.stat().st_mtime_ns for path in stopped.glob("*") if path.is_file()}
    second = fourge.quantize(str(pico()), stopped, **OPTIONS)
    assert second.fidelity == first.fidelity
    assert {path: path.stat().st_mtime_ns for path in stopped.glob("*") if path.is_file()} == times
    assert not list((stopped / FOLDER).glob("hidden-*"))


def test_an_index_is_only_there_when_all_is(stopped: Path, pico: Callable[..., Path]) -> None:
    assert not (stopped / INDEX).exists() and not (stopped / "config.json").exists()
    fourge.quantize(str(pico()), stopped, **OPTIONS)
    assert (stopped / INDEX).exists() and (stopped / "config.json").exists()
