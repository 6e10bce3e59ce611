"""Headers made by safetensors read as it reads them; headers made by hand to mislead are refused by name."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fourge.checkpoint.header import DTYPES, read_header
from fourge.errors import InputError


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file of a length field, `header` (JSON of anything but bytes) and `data`, consistent or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert "download" in message
    return message


def test_reads_what_safetensors_wrote(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "made": "here"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt", "made": "here"}
    assert found.keys() == tensors.keys()
    content = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        for name, info in found.items():
            expected = file.get_slice(name)
            assert (info.dtype, list(info.shape)) == (expected.get_dtype(), expected.get_shape())
            assert info.torch_dtype == tensors[name].dtype
            assert info.nbytes == tensors[name].nbytes
            stored = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[info.begin : info.end] == stored


def test_knows_every_dtype_that_safetensors_writes_for_torch() -> None:
    from safetensors.torch import _TYPES

    assert DTYPES == _TYPES


def test_file_without_tensors(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "x", {})) == ({}, {})


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_too_short(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert f"{len(content)} bytes are too few" in refusal(path)


@pytest.mark.parametrize("length", [100_000_001, 2**64 - 1])
def test_huge_header_is_not_allocated(tmp_path: Path, length: int) -> None:
    assert str(length) in refusal(write_raw(tmp_path / "x", {}, length=length))


def test_header_beyond_the_file(tmp_path: Path) -> None:
    message = refusal(write_raw(tmp_path / "x", {}, length=1000))
    assert "truncated: its header takes 1008 bytes, the file has 10" in message


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"17", "not a JSON object"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "U8"}}', "'dtype' occurs twice"),
        (b'{"__metadata__": {"format": 1}}', "__metadata__"),
        (b'{"__metadata__": []}', "__metadata__"),
    ],
)
def test_header_that_is_no_table(tmp_path: Path, raw: bytes, what: str) -> None:
    assert what in refusal(write_raw(tmp_path / "x", raw))


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ([], "lacks dtype"),
        ({"dtype": "F32", "shape": [2]}, "lacks dtype, shape or data_offsets"),
        (entry(dtype="F31"), "unknown dtype 'F31'"),
        (entry(dtype=["F32"]), "unknown dtype"),
        (entry(shape=2), "shape 2 is not a list of sizes"),
        (entry(shape=[-2]), "shape [-2] is not"),
        (entry(shape=[2.0]), "shape [2.0] is not"),
        (entry(shape=[True, 2]), "shape [True, 2] is not"),
        (entry(shape=[2**63]), "is not a list of sizes"),
        (entry(shape=[2**62, 2**62]), "64 bits"),
        (entry(shape=[0, 2**62, 2**62], offsets=(0, 0)), "64 bits"),
        (entry(offsets=[0]), "not two offsets"),
        (entry(offsets=[-8, 0]), "not two offsets"),
        (entry(offsets=[0, 8.0]), "not two offsets"),
        (entry(offsets="08"), "not two offsets"),
        (entry(offsets=[8, 0]), "begins at byte 8, after its end at byte 0"),
        (entry(offsets=[0, 4]), "takes 8 bytes, its offsets span 4"),
        (entry(shape=[3]), "takes 12 bytes, its offsets span 8"),
    ],
)
def test_malformed_entry_is_refused_by_name(tmp_path: Path, bad: Any, what: str) -> None:
    message = refusal(write_raw(tmp_path / "x", {"model.norm": bad}, bytes(8)))
    assert "model.norm: " in message
    assert what in message


def test_shape_that_wraps_around_64_bits_to_the_right_size(tmp_path: Path) -> None:
    # 2**62 * 4 bytes * 2 is 2**65, which is 0 in 64 bits: it would span exactly the offsets [0, 0].
    message = refusal(write_raw(tmp_path / "x", {"a": entry(shape=[2**62, 2], offsets=(0, 0))}))
    assert "a: " in message
    assert "64 bits" in message


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\u2028b"])
def test_unprintable_names_never_reach_a_terminal(tmp_path: Path, name: str) -> None:
    message = refusal(write_raw(tmp_path / "x", {name: entry()}, bytes(8)))
    assert "unprintable" in message
    assert message.isprintable()


def test_overlap(tmp_path: Path) -> None:
    header = {"a": entry(), "b": entry(offsets=[4, 12])}
    assert "b overlaps a" in refusal(write_raw(tmp_path / "x", header, bytes(12)))


def test_same_bytes_for_two_tensors(tmp_path: Path) -> None:
    assert "b overlaps a" in refusal(write_raw(tmp_path / "x", {"a": entry(), "b": entry()}, bytes(8)))


def test_hole(tmp_path: Path) -> None:
    header = {"a": entry(), "b": entry(offsets=[16, 24])}
    message = refusal(write_raw(tmp_path / "x", header, bytes(24)))
    assert "between a and b, belong to no tensor" in message


def test_hole_before_the_first(tmp_path: Path) -> None:
    message = refusal(write_raw(tmp_path / "x", {"a": entry(offsets=[8, 16])}, bytes(16)))
    assert "between the header and a" in message


def test_offsets_far_outside_the_file(tmp_path: Path) -> None:
    message = refusal(write_raw(tmp_path / "x", {"a": entry("U8", [2**60], [0, 2**60])}, bytes(8)))
    assert "truncated" in message
    assert " a" in message


def test_truncated_shard_says_both_sizes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 1)
    message = refusal(path)
    assert f"truncated: the header says {whole} bytes, the file has {whole - 1}" in message
    assert "model.layers.0.mlp.weight" in message  # F16 comes last in the file
    with pytest.raises(SafetensorError):
        safe_open(path, framework="pt").__enter__()


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    message = refusal(write_raw(tmp_path / "x", {"a": entry()}, bytes(11)))
    assert "3 bytes after a belong to no tensor" in message
