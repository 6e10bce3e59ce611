"""What threads read ahead of a GPU comes in order, and no further than is wanted; on a CPU they have no part in it."""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fourge.checkpoint.reader import Checkpoint, byte_view
from fourge.errors import InputError
from fourge.walk.ahead import RowWriter, _ahead, read_rows, read_tensor
from fourge.walk.hidden import HiddenFile, HiddenLayout, checksum_bytes, checksum_rows

CPU = torch.device("cpu")


def test_what_is_read_ahead_comes_in_its_order() -> None:
    def slow_first(number: int) -> torch.Tensor:
        time.sleep(0.004 * (5 - number % 5))
        return torch.tensor(number)

    assert [int(x) for x in _ahead(slow_first, range(13))] == list(range(13))


def test_no_more_is_read_than_is_wanted() -> None:
    begun, go_on = [], threading.Event()

    def work(number: int) -> torch.Tensor:
        begun.append(number)
        assert number < 2 or go_on.wait(10)
        return torch.tensor(number)

    reading = _ahead(work, range(1000))
    assert int(next(reading)) == 0
    go_on.set()
    reading.close()
    assert len(begun) < 20


def test_a_failure_is_raised_where_its_piece_was_due() -> None:
    def work(number: int) -> torch.Tensor:
        if number == 2:
            raise InputError("cut short")
        return torch.tensor(number)

    reading, came = _ahead(work, range(9)), []
    with pytest.raises(InputError, match="cut short"):
        came.extend(int(x) for x in reading)
    assert came == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_go_through_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(7, 64).to(dtype)
    layout = HiddenLayout(7, 64, dtype)
    with HiddenFile(tmp_path / "rows", layout, create=True) as file:
        with RowWriter(file, InputError("out of range")) as writer:
            writer.write(3, rows[3:])
            writer.write(0, rows[:3])
            writer.wait()
        checksum = file.finish()
        with closing(read_rows(file, [(5, 7), (0, 5)], CPU)) as coming:
            assert [part.tolist() for part in coming] == [rows[5:].tolist(), rows[:5].tolist()]
    assert checksum == checksum_bytes(byte_view(rows)) == int(checksum_rows(rows)) % (1 << 64)


def test_rows_out_of_range_are_not_written(tmp_path: Path) -> None:
    rows = torch.ones(2, 4)
    rows[1, 2] = torch.inf
    with (
        HiddenFile(tmp_path / "rows", HiddenLayout(2, 4, torch.float32), create=True) as file,
        pytest.raises(InputError, match="out of range"),
        RowWriter(file, InputError("out of range")) as writer,
    ):
        writer.write(0, rows)
    assert (tmp_path / "rows").read_bytes() == b""


def test_a_tensor_read_in_pieces(pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is read for a GPU, but for where it lies."""
    source = Checkpoint.open(pico())
    read = Checkpoint.read
    rows_read: list[slice] = []

    def unpinned(checkpoint: Checkpoint, name: str, rows: slice | None = None, *, pinned: bool) -> torch.Tensor:
        assert pinned and rows is not None
        rows_read.append(rows)
        return read(checkpoint, name, rows)

    monkeypatch.setattr("fourge.walk.ahead._PIECE_BYTES", 1000)
    monkeypatch.setattr(Checkpoint, "read", unpinned)
    name = "model.layers.0.mlp.up_proj.weight"
    here = read_tensor(source, name, torch.device("meta"))
    assert here.shape == (96, 64) and sorted((s.start, s.stop) for s in rows_read)[:2] == [(0, 7), (7, 14)]
    assert sum(s.stop - s.start for s in rows_read) == 96
