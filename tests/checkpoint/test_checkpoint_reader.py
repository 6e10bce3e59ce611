"""Checkpoints written by safetensors, read back; directories that lie or lack something, refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fourge.checkpoint.reader import Checkpoint, require_finite, require_float, require_unquantized
from fourge.errors import InputError

EMBEDDING = "model.embed_tokens.weight"
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Edit = Callable[[Callable[[dict], object]], None]


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(params=["single", "sharded"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint.open(request.getfixturevalue(request.param))


class TestReading:
    def test_tensors_config_and_metadata(self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        assert list(checkpoint.tensors) == sorted(tensors)
        assert checkpoint.config == CONFIG
        sharded = "sharded" in checkpoint.directory.name
        assert checkpoint.index_metadata == ({"total_size": 1} if sharded else {})

    def test_every_tensor_bit_for_bit(self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        for name, expected in tensors.items():
            found = checkpoint.read(name)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert torch.equal(found, expected)
        assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in tensors.values())

    @pytest.mark.parametrize("rows", [slice(3, 9), slice(None, 4), slice(48, 99), slice(5, 5), slice(9, 3)])
    def test_rows(self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], rows: slice) -> None:
        found = checkpoint.read(EMBEDDING, rows)
        assert torch.equal(found, tensors[EMBEDDING][rows])
        assert checkpoint.bytes_read == found.nbytes

    def test_gathers_each_distinct_row_once(self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        indices = torch.tensor([49, 0, 7, 7, 0, 49, 7])
        assert torch.equal(checkpoint.gather_rows(EMBEDDING, indices), tensors[EMBEDDING][indices])
        assert checkpoint.bytes_read == 3 * 8 * 2

    def test_gathers_nothing(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.gather_rows(EMBEDDING, torch.tensor([], dtype=torch.int64)).shape == (0, 8)

    @pytest.mark.parametrize("row", [50, -1])
    def test_row_outside_the_tensor(self, checkpoint: Checkpoint, row: int) -> None:
        with pytest.raises(InputError, match=f"{EMBEDDING} has 50 rows, row {row} "):
            checkpoint.gather_rows(EMBEDDING, torch.tensor([3, row]))

    @pytest.mark.parametrize("chunk_bytes", [1, 7, 800, 1 << 20])
    def test_chunks_are_the_bytes(
        self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], chunk_bytes: int
    ) -> None:
        chunks = [bytes(chunk) for chunk in checkpoint.chunks(EMBEDDING, chunk_bytes)]
        assert b"".join(chunks) == tensors[EMBEDDING].view(torch.uint8).numpy().tobytes()
        assert max(map(len, chunks)) == min(chunk_bytes, 800)

    def test_reads_on_when_the_system_returns_short(
        self, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = os.preadv
        calls = []

        def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            calls.append(offset)
            return whole(descriptor, [buffers[0][:7]], offset)

        monkeypatch.setattr(os, "preadv", short)
        assert torch.equal(checkpoint.read(EMBEDDING), tensors[EMBEDDING])
        assert len(calls) == -(-800 // 7)

    def test_file_cut_short_after_opening(self, checkpoint: Checkpoint) -> None:
        info = checkpoint.tensors[EMBEDDING]
        with info.path.open("r+b") as file:
            file.truncate(info.begin + 10)
        with pytest.raises(InputError, match=f"{info.path.name}.*{EMBEDDING}"):
            checkpoint.read(EMBEDDING)


class TestDigest:
    def test_same_for_a_copy_elsewhere(self, sharded: Path, tmp_path: Path) -> None:
        shutil.copytree(sharded, tmp_path / "elsewhere")
        assert Checkpoint.open(sharded).digest() == Checkpoint.open(tmp_path / "elsewhere").digest()

    def test_changes_with_config_index_and_headers(self, sharded: Path, edit_index: Edit) -> None:
        digests = {Checkpoint.open(sharded).digest()}
        (sharded / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1}))
        digests.add(Checkpoint.open(sharded).digest())
        edit_index(lambda index: index["metadata"].update(total_size=2))
        digests.add(Checkpoint.open(sharded).digest())
        save_file({EMBEDDING: torch.zeros(40, 10, dtype=torch.bfloat16)}, sharded / SHARDS[0])
        digests.add(Checkpoint.open(sharded).digest())
        save_file({EMBEDDING: torch.zeros(40, 10, dtype=torch.float16)}, sharded / SHARDS[0])
        digests.add(Checkpoint.open(sharded).digest())
        assert len(digests) == 5

    def test_does_not_read_weights(self, single: Path) -> None:
        checkpoint = Checkpoint.open(single)
        checkpoint.digest()
        assert checkpoint.bytes_read == 0


class TestRefused:
    def test_missing_directory(self, tmp_path: Path) -> None:
        assert f"{tmp_path / 'none'}: no such directory" in refusal(tmp_path / "none")

    def test_missing_config(self, single: Path) -> None:
        (single / "config.json").unlink()
        assert f"{single / 'config.json'}: missing" in refusal(single)

    @pytest.mark.parametrize("content", ["{", "[]", ""])
    def test_config_that_is_no_object(self, single: Path, content: str) -> None:
        (single / "config.json").write_text(content)
        assert f"{single / 'config.json'} is not" in refusal(single)

    def test_missing_shard(self, sharded: Path) -> None:
        (sharded / SHARDS[1]).unlink()
        message = refusal(sharded)
        assert str(sharded) in message
        assert f"shard '{SHARDS[1]}' is missing" in message

    def test_damaged_shard(self, sharded: Path) -> None:
        with (sharded / SHARDS[1]).open("ab") as file:
            file.write(b"x")
        assert str(sharded / SHARDS[1]) in refusal(sharded)

    @pytest.mark.parametrize("outside", ["../secret.safetensors", "{absolute}", "sub/x.safetensors", "..\\x"])
    def test_index_that_names_a_file_elsewhere(self, sharded: Path, edit_index: Edit, outside: str) -> None:
        secret = sharded.parent / "secret.safetensors"
        shutil.copy(sharded / SHARDS[0], secret)
        outside = outside.format(absolute=secret)
        edit_index(lambda index: index["weight_map"].update({EMBEDDING: outside}))
        message = refusal(sharded)
        assert EMBEDDING in message
        assert repr(outside) in message
        assert "outside the directory" in message

    @pytest.mark.parametrize("name", ["", ".", "..", "a\x00b", "x" * 5000, "\ud800"])
    def test_index_with_a_name_no_file_can_have(self, sharded: Path, edit_index: Edit, name: str) -> None:
        edit_index(lambda index: index["weight_map"].update({EMBEDDING: name}))
        assert "missing" in refusal(sharded)

    def test_shard_that_is_a_symlink_out_of_the_directory(self, sharded: Path) -> None:
        outside = sharded.parent / "outside.safetensors"
        (sharded / SHARDS[0]).rename(outside)
        (sharded / SHARDS[0]).symlink_to(outside)
        message = refusal(sharded)
        assert str(sharded / SHARDS[0]) in message
        assert "symlink out of the directory" in message

    def test_shard_that_is_a_folder(self, sharded: Path) -> None:
        (sharded / SHARDS[0]).unlink()
        (sharded / SHARDS[0]).mkdir()
        assert f"{sharded / SHARDS[0]}: not a regular file" in refusal(sharded)

    def test_index_names_a_tensor_the_shard_lacks(self, sharded: Path, edit_index: Edit) -> None:
        edit_index(lambda index: index["weight_map"].update({"model.extra": SHARDS[1]}))
        assert f"{sharded / SHARDS[1]}: lacks 'model.extra'" in refusal(sharded)

    def test_shard_holds_a_tensor_the_index_does_not_name(self, sharded: Path, edit_index: Edit) -> None:
        edit_index(lambda index: index["weight_map"].pop("model.norm.weight"))
        message = refusal(sharded)
        assert f"{sharded / SHARDS[1]}: holds model.norm.weight" in message
        assert "does not name" in message

    def test_shard_holds_a_tensor_the_index_maps_elsewhere(self, sharded: Path, edit_index: Edit) -> None:
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": SHARDS[0]}))
        message = refusal(sharded)
        assert f"{sharded / SHARDS[1]}: holds model.norm.weight" in message
        assert f"maps to {SHARDS[0]}" in message

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda index: index.pop("weight_map"), "weight_map"),
            (lambda index: index.update(weight_map=[]), "weight_map"),
            (lambda index: index["weight_map"].update(x=1), "weight_map"),
            (lambda index: index.update(metadata=[1]), "metadata"),
        ],
    )
    def test_malformed_index(
        self, sharded: Path, edit_index: Edit, change: Callable[[dict], object], what: str
    ) -> None:
        edit_index(change)
        message = refusal(sharded)
        assert "model.safetensors.index.json" in message
        assert what in message

    def test_index_beside_a_single_file_it_does_not_name(self, sharded: Path) -> None:
        shutil.copy(sharded / SHARDS[0], sharded / "model.safetensors")
        message = refusal(sharded)
        assert str(sharded) in message
        assert "remove the stale one" in message


class TestRequirements:
    @pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
    def test_quantized_config(self, single: Path, key: str) -> None:
        (single / "config.json").write_text(json.dumps(CONFIG | {key: {"quant_method": "gptq"}}))
        with pytest.raises(InputError, match=rf"{single}/config.json: already quantized \({key}, method gptq\)"):
            require_unquantized(Checkpoint.open(single))

    def test_quantized_by_modelopt(self, single: Path) -> None:
        (single / "hf_quant_config.json").write_text("{}")
        with pytest.raises(InputError, match=f"{single}/hf_quant_config.json: already quantized"):
            require_unquantized(Checkpoint.open(single))

    def test_null_says_unquantized(self, single: Path) -> None:
        (single / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": None}))
        require_unquantized(Checkpoint.open(single))

    def test_other_dtypes(self, single: Path, tensors: dict[str, torch.Tensor]) -> None:
        require_float(Checkpoint.open(single))
        packed = {"model.packed": torch.zeros(4, dtype=torch.uint8)}
        save_file(tensors | packed, single / "model.safetensors")
        with pytest.raises(InputError, match=r"model.safetensors: model.packed is U8; .* BF16, F16, F32"):
            require_float(Checkpoint.open(single))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("index", [(0, 0), (1, 700_000), (2, 1_048_574), (2, 1_048_578)])
    def test_not_finite(self, single: Path, dtype: torch.dtype, value: float, index: tuple[int, int]) -> None:
        info = Checkpoint.open(single).tensors[EMBEDDING]
        tensor = torch.randn(3, 1_048_579).clamp(-3, 3).to(dtype)  # a little more than a chunk a row
        require_finite(tensor, info)
        tensor[2, -1] = torch.nan
        tensor[index] = value  # the first of the two, or in its place
        with pytest.raises(InputError) as caught:
            require_finite(tensor, info)
        assert f"model.safetensors: {EMBEDDING}{list(index)} is {value};" in str(caught.value)

    def test_largest_values_are_finite(self, single: Path) -> None:
        info = Checkpoint.open(single).tensors[EMBEDDING]
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            limits = torch.finfo(dtype)
            require_finite(torch.tensor([limits.max, limits.min, -0.0, limits.smallest_normal / 2], dtype=dtype), info)
        require_finite(torch.zeros(0, 4), info)

    def test_rows_are_counted_from_the_first(self, single: Path) -> None:
        info = Checkpoint.open(single).tensors[EMBEDDING]
        block = torch.zeros(4, 8)
        block[2, 5] = torch.inf
        with pytest.raises(InputError, match=r"\[42, 5\] is inf"):
            require_finite(block, info, first_row=40)

    def test_scalar(self, single: Path) -> None:
        info = Checkpoint.open(single).tensors["model.layers.0.scalar"]
        with pytest.raises(InputError, match=r"model.layers.0.scalar\[\] is nan"):
            require_finite(torch.tensor(torch.nan), info)
