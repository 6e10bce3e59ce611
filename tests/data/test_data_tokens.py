"""Token sets: their digest, and the file that keeps them."""

import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fourge.data import DataRequest, TokenSet, TokenSets, load_token_sets, read_token_sets, save_token_sets
from fourge.errors import InputError


def token_set(*sequences: list[int]) -> TokenSet:
    return TokenSet(tuple(np.array(sequence, dtype=np.int32) for sequence in sequences))


@pytest.fixture
def sets(request_for: Callable[..., DataRequest], tmp_path: Path) -> TokenSets:
    request = request_for(
        "random", num_calibration_samples=3, num_validation_samples=4, num_probe_samples=2, max_seq_length=5
    )
    return load_token_sets(request, tmp_path, 1000, None)


def test_the_digest_is_over_lengths_then_tokens() -> None:
    tokens = token_set([7, 8, 9], [1, 2])
    assert tokens.num_tokens == 5
    assert tokens.digest() == hashlib.sha256(struct.pack("<7i", 3, 2, 7, 8, 9, 1, 2)).hexdigest()


def test_the_digest_changes_with_tokens_order_and_cuts() -> None:
    digests = [
        token_set(*sequences).digest()
        for sequences in ([[1, 2], [3, 4]], [[1, 2], [3, 5]], [[3, 4], [1, 2]], [[1, 2, 3], [4]], [[1, 2, 3, 4]], [])
    ]
    assert len(set(digests)) == len(digests)


def test_saved_and_read_again(sets: TokenSets, tmp_path: Path) -> None:
    uneven = TokenSets(token_set([1, 2, 3], [4, 5]), sets.validation, sets.probe, sets.provenance)
    uneven.provenance["calibration"]["sha256"] = uneven.calibration.digest()
    path = tmp_path / "tokens.safetensors"
    save_token_sets(path, uneven)
    read = read_token_sets(path)
    assert [s.tolist() for s in read.calibration.sequences] == [[1, 2, 3], [4, 5]]
    assert [s.tolist() for s in read.probe.sequences] == [s.tolist() for s in sets.probe.sequences]
    assert {s.dtype for s in read.calibration.sequences} == {np.dtype("int32")}
    assert read.provenance == uneven.provenance


def test_a_file_of_flat_tokens_and_lengths_that_safetensors_reads(sets: TokenSets, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_token_sets(path, sets)
    arrays = load_file(path)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "calibration.tokens": ("int32", (15,)),
        "calibration.lengths": ("int32", (3,)),
        "validation.tokens": ("int32", (20,)),
        "validation.lengths": ("int32", (4,)),
        "probe.tokens": ("int32", (10,)),
        "probe.lengths": ("int32", (2,)),
    }
    assert arrays["probe.tokens"].tolist() == [t for s in sets.probe.sequences for t in s.tolist()]


def test_an_empty_probe_is_kept(request_for: Callable[..., DataRequest], tmp_path: Path) -> None:
    sets = load_token_sets(request_for("random"), tmp_path, 1000, None)
    save_token_sets(tmp_path / "tokens.safetensors", sets)
    assert read_token_sets(tmp_path / "tokens.safetensors").probe.sequences == ()


def test_equal_sets_give_equal_bytes_in_every_process(sets: TokenSets, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_token_sets(path, sets)
    save_token_sets(tmp_path / "again", read_token_sets(path))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    code = (
        "import sys; from pathlib import Path; from fourge.data import read_token_sets, save_token_sets;"
        "save_token_sets(Path(sys.argv[2]), read_token_sets(Path(sys.argv[1])))"
    )
    for seed in ("1", "2"):
        other = tmp_path / f"other{seed}"
        subprocess.run([sys.executable, "-c", code, path, other], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        assert other.read_bytes() == path.read_bytes()


def test_every_flipped_token_or_length_is_noticed(sets: TokenSets, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_token_sets(path, sets)
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for position in range(8 + header, len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(InputError, match=r"tokens\.safetensors: the token sequences are damaged .*--restart"):
            read_token_sets(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_file_is_noticed(sets: TokenSets, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "tokens.safetensors"
    save_token_sets(path, sets)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged"):
        read_token_sets(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.int32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="damaged"):
        read_token_sets(tmp_path / "x.safetensors")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    sets: TokenSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens.safetensors"
    path.write_bytes(b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_token_sets(path, sets)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_importing_the_room_is_light() -> None:
    heavy = ["transformers", "datasets", "pyarrow", "torch"]
    code = f"import sys, fourge.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
