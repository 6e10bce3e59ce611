"""The writer against safetensors' own: the same bytes, the same sizes, and files that its reader opens."""

import errno
import hashlib
import io
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from fourge.checkpoint import writer
from fourge.checkpoint.header import DTYPES
from fourge.checkpoint.reader import Checkpoint
from fourge.checkpoint.writer import Copied, index_json, safetensors_size, write_safetensors


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor of `shape` with every bit pattern equally likely (0 and 1 for bool)."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


QUANTIZED_LAYER = {
    "model.layers.0.mlp.up_proj.weight_packed": random_bytes((32, 8), torch.uint8, 1),
    "model.layers.0.mlp.up_proj.weight_scale": random_bytes((32, 1), torch.float8_e4m3fn, 2),
    "model.layers.0.mlp.up_proj.weight_global_scale": random_bytes((1,), torch.float32, 3),
    "model.layers.0.mlp.up_proj.input_global_scale": random_bytes((1,), torch.float32, 4),
    "model.layers.0.mlp.up_proj.bias": random_bytes((32,), torch.bfloat16, 5),
    "model.layers.0.input_layernorm.weight": random_bytes((16,), torch.bfloat16, 6),
    "model.layers.0.post_attention_layernorm.weight": random_bytes((15,), torch.float16, 7),
}
EVERY_DTYPE = {
    f"{place}.{name}": random_bytes((3, 5), dtype, place) for name, dtype in DTYPES.items() for place in (2, 1)
}
ODD_SHAPES = {
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
    'é"\\\t\x7f\u2028😀/': torch.zeros(3, dtype=torch.uint8),
    "Z": torch.zeros(2),
    "a.10": torch.zeros(1, 1, 1),
    "a.9": torch.zeros(2, 2),
}
SETS = {"layer": QUANTIZED_LAYER, "dtypes": EVERY_DTYPE, "odd": ODD_SHAPES}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None, {}, {"é\n": 'x"'}], ids=str)
@pytest.mark.parametrize("entries", SETS.values(), ids=SETS)
def test_same_bytes_as_safetensors(
    tmp_path: Path, entries: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "shard.tmp"
    written = write_safetensors(path, entries, metadata)
    expected = save(entries, metadata)
    assert path.read_bytes() == expected
    assert written.path == path
    assert written.size == len(expected)
    assert written.sha256 == hashlib.sha256(expected).hexdigest()


def test_no_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {})
    assert (tmp_path / "x").read_bytes() == save({}, {"format": "pt"})


def test_default_metadata_is_what_transformers_asks_for(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", QUANTIZED_LAYER)
    save_file(QUANTIZED_LAYER, tmp_path / "y", metadata={"format": "pt"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_metadata_order_does_not_depend_on_the_table(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", ODD_SHAPES, {"a": "1", "b": "2", "c": "3"})
    write_safetensors(tmp_path / "y", ODD_SHAPES, {"c": "3", "a": "1", "b": "2"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"a": "1", "b": "2", "c": "3"}


def test_safe_open_reads_it(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", QUANTIZED_LAYER)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert set(file.keys()) == set(QUANTIZED_LAYER)
        for name, tensor in QUANTIZED_LAYER.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("entries", SETS.values(), ids=SETS)
def test_size_is_known_before_writing(entries: dict[str, torch.Tensor]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    specs = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in entries.items()}
    assert safetensors_size(specs) == len(save(entries, {"format": "pt"}))
    assert safetensors_size(specs, None) == len(save(entries))


@pytest.mark.parametrize("chunk_bytes", [1, 5, 64])
def test_copies_and_tensors_in_small_chunks(
    tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(Checkpoint.chunks, "__defaults__", (chunk_bytes,))
    source = Checkpoint.open(single)
    copied = {f"renamed.{name}": Copied(source, name) for name in source.tensors}
    expected = {f"renamed.{name}": source.read(name) for name in source.tensors} | QUANTIZED_LAYER
    write_safetensors(tmp_path / "x", copied | QUANTIZED_LAYER)
    assert (tmp_path / "x").read_bytes() == save(expected, {"format": "pt"})


def test_whole_model_round_trip(tmp_path: Path, single: Path) -> None:
    source = Checkpoint.open(single)
    write_safetensors(tmp_path / "x", {name: Copied(source, name) for name in source.tensors})
    assert (tmp_path / "x").read_bytes() == (single / "model.safetensors").read_bytes()


def test_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is full after 100 bytes: the error goes on, the partial file does not stay."""

    class FullDisk(io.FileIO):
        room = 100

        def write(self, data: bytes) -> int:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = super().write(memoryview(data)[: self.room])
            self.room -= count
            return count

    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedWriter(FullDisk(path, mode)))
    path = tmp_path / "shard.tmp"
    with pytest.raises(OSError, match="No space left") as caught:
        write_safetensors(path, QUANTIZED_LAYER)
    assert caught.value.errno == errno.ENOSPC
    assert not path.exists()


def test_failed_fsync_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_safetensors(tmp_path / "x", QUANTIZED_LAYER)
    assert list(tmp_path.iterdir()) == []


def test_source_that_fails_in_the_middle_leaves_no_file(tmp_path: Path, single: Path) -> None:
    source = Checkpoint.open(single)
    os.truncate(single / "model.safetensors", source.tensors["model.embed_tokens.weight"].begin + 3)
    with pytest.raises(ValueError, match="cut short"):
        write_safetensors(tmp_path / "x", {name: Copied(source, name) for name in source.tensors})
    assert not (tmp_path / "x").exists()


def test_a_longer_file_in_its_place_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10_000))
    write_safetensors(tmp_path / "x", {"a": torch.zeros(2)})
    assert (tmp_path / "x").read_bytes() == save({"a": torch.zeros(2)}, {"format": "pt"})


def test_index_in_the_hubs_form() -> None:
    index = index_json({"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}, 12)
    assert list(index["weight_map"]) == ["a", "b"]
    assert index["metadata"] == {"total_size": 12}
