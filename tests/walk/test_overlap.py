"""Threads that write behind the walk and read ahead of it: bounded, heard when they fail, and no byte is theirs."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

import fourge
import fourge.walk.source_digests
import fourge.walk.steps
from fourge.checkpoint.reader import Checkpoint
from fourge.checkpoint.writer import write_safetensors
from fourge.errors import InputError
from fourge.walk.one_behind import OneBehind
from fourge.walk.source_digests import SourceDigests

WEIGHT_ONLY: dict[str, Any] = {"scheme": "NVFP4A16", "calibration": "none", "method": "search", "threads": 1}
WITH_DATA: dict[str, Any] = {
    "calibration": "random",
    "method": "max",
    "num_calibration_samples": 3,
    "num_probe_samples": 2,
    "max_seq_length": 12,
    "threads": 1,
}
DEADLINE = 30.0
"""Seconds after which a thread that should have gone on is taken to be stuck."""


class TestOneBehind:
    def test_one_piece_after_the_other_while_the_caller_goes_on(self) -> None:
        done: list[int] = []
        go_on = threading.Event()

        def slow() -> None:
            assert go_on.wait(DEADLINE)
            done.append(1)

        with OneBehind("test") as behind:
            behind.hand_over(slow)
            assert done == []
            go_on.set()
            behind.hand_over(lambda: done.append(2))  # waits for the first
            assert done[0] == 1
        assert done == [1, 2]

    def test_what_a_piece_raises_is_raised_where_the_next_is_handed_over(self) -> None:
        def fail() -> None:
            raise InputError("no room")

        with pytest.raises(InputError, match="no room"), OneBehind("test") as behind:
            behind.hand_over(fail)
            behind.hand_over(lambda: pytest.fail("it went on"))
        with pytest.raises(InputError, match="no room"), OneBehind("test") as behind:
            behind.hand_over(fail)  # the last one

    def test_the_callers_own_error_is_told_once_the_piece_has_ended(self) -> None:
        done: list[int] = []
        with pytest.raises(InputError, match="the caller's"), OneBehind("test") as behind:
            behind.hand_over(lambda: (time.sleep(0.05), done.append(1))[1])
            raise InputError("the caller's")
        assert done == [1]


@pytest.fixture
def sharded(pico: Callable[..., Path]) -> Checkpoint:
    """Four layers in files of a layer or so each."""
    return Checkpoint.open(pico(num_hidden_layers=4, max_shard_size="60KB"))


def steps_of(source: Checkpoint) -> list[list[str]]:
    """The names of its tensors as a walk reads them: embedding, layers, the rest."""
    layers = [[name for name in source.tensors if name.startswith(f"model.layers.{i}.")] for i in range(4)]
    return [["model.embed_tokens.weight"], *layers, ["model.norm.weight", "lm_head.weight"]]


class TestSourceDigests:
    def test_they_are_those_of_the_files(self, sharded: Checkpoint) -> None:
        with SourceDigests(sharded, steps_of(sharded)) as digests:
            digests.begin(0)
            found = digests.finish()
        files = sorted(sharded.directory.glob("*.safetensors"))
        assert len(files) > 3
        assert found == {
            path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in files
        }

    def test_the_thread_stays_within_the_next_step(self, sharded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        block = 1024
        monkeypatch.setattr(fourge.walk.source_digests, "_BLOCK_BYTES", block)
        steps = steps_of(sharded)
        sizes = [sum(sharded.tensors[name].nbytes for name in names) for names in steps]
        with SourceDigests(sharded, steps) as digests:
            for step in range(len(steps) - 2):
                digests.begin(step)
                reach = sum(sizes[: step + 2])
                ended = time.monotonic() + DEADLINE
                while digests._read < reach and time.monotonic() < ended:
                    time.sleep(0.001)
                wait(list(digests._digests.values()), timeout=0.02)  # time enough to go too far
                assert reach <= digests._read < reach + block

    def test_a_walk_that_stops_early_leaves_no_thread(self, sharded: Checkpoint) -> None:
        before = threading.active_count()
        with pytest.raises(InputError, match="elsewhere"), SourceDigests(sharded, steps_of(sharded)) as digests:
            digests.begin(0)
            raise InputError("elsewhere")
        assert threading.active_count() == before

    def test_a_file_that_cannot_be_read_is_told_at_the_end(self, pico: Callable[..., Path], tmp_path: Path) -> None:
        source = Checkpoint.open(pico())
        (path,) = {info.path for info in source.tensors.values()}
        gone = tmp_path / path.name
        gone.write_bytes(path.read_bytes())
        info = next(iter(source.tensors.values()))
        moved = Checkpoint(tmp_path, {info.name: type(info)(**vars(info) | {"path": gone})}, {}, {}, {})
        digests = SourceDigests(moved, [[info.name]])
        gone.unlink()
        with pytest.raises(FileNotFoundError, match=path.name), digests:
            digests.finish()


@pytest.mark.parametrize("options", [WEIGHT_ONLY, WITH_DATA], ids=["weight-only", "with data"])
def test_a_shard_is_written_while_the_next_layer_is_read(
    options: dict[str, Any], pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard's writer waits until a tensor of the next layer was read; the bytes are those of an ordinary run."""
    source = pico(num_hidden_layers=3)
    fourge.quantize(str(source), tmp_path / "ordinary", **options)
    read = [threading.Event() for _ in range(3)]

    def noticed(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def read_tensor(checkpoint: Checkpoint, name: str, *arguments: Any) -> torch.Tensor:
            if name.startswith("model.layers."):
                read[int(name.split(".")[2])].set()
            return original(checkpoint, name, *arguments)

        return read_tensor

    def patient(path: Path, entries: Any) -> Any:
        (step,) = {int(name.split(".")[2]) + 1 for name in entries if name.startswith("model.layers.")} or {0}
        if (step == 0 and "lm_head.weight" not in entries) or 0 < step < 3:
            assert read[step].wait(DEADLINE), "the walk waited for the shard"
        return write_safetensors(path, entries)

    monkeypatch.setattr(Checkpoint, "read", noticed(Checkpoint.read))
    monkeypatch.setattr(Checkpoint, "read_into", noticed(Checkpoint.read_into))
    monkeypatch.setattr(fourge.walk.steps, "write_safetensors", patient)
    fourge.quantize(str(source), tmp_path / "patient", **options)
    for path in (tmp_path / "ordinary").iterdir():
        if path.is_file():
            assert (tmp_path / "patient" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_layer_that_is_refused_leaves_the_one_before_committed(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard of the layer before is still being written when the walk meets a NaN."""
    source = pico()
    damaged = tmp_path / "model"
    damaged.mkdir()
    for path in source.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    info = Checkpoint.open(damaged).tensors["model.layers.1.mlp.down_proj.weight"]
    with info.path.open("r+b") as file:
        file.seek(info.begin)
        file.write(b"\xc0\x7f")
    met = threading.Event()
    original = fourge.walk.weight_step.require_finite

    def noticed(tensor: torch.Tensor, info: Any) -> None:
        try:
            original(tensor, info)
        except InputError:
            met.set()
            raise

    def late(path: Path, entries: Any) -> Any:
        if "model.layers.0.input_layernorm.weight" in entries:
            assert met.wait(DEADLINE)
        return write_safetensors(path, entries)

    monkeypatch.setattr(fourge.walk.weight_step, "require_finite", noticed)
    monkeypatch.setattr(fourge.walk.steps, "write_safetensors", late)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight\[0, 0\] is nan"):
        fourge.quantize(str(damaged), tmp_path / "out", **WEIGHT_ONLY)
    manifest = json.loads((tmp_path / "out" / ".fourge" / "job.json").read_text())
    assert len(manifest["steps"]) == 2
    assert not list((tmp_path / "out").rglob("*.tmp"))
