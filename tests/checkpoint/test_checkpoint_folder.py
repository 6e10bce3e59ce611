"""What of a directory may be opened, what is carried over, and what is said of one without weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fourge.checkpoint.reader import Checkpoint
from fourge.errors import InputError


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(directory)
    return str(caught.value)


def link_as_hub_cache(cache: Path, source: Path, shared_store: bool = False) -> Path:
    """Lays `source` out as the hub cache does; returns the snapshot, whose files are all symlinks."""
    model = cache / "models--org--name"
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = model / "blobs" / f"{number:064x}"
        if shared_store:
            store = cache / "blobs" / "00" / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, store)
            blob.symlink_to(Path("../../blobs/00") / blob.name)
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("shared_store", [False, True])
def test_hub_cache_links_are_followed(
    sharded: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, shared_store: bool
) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    snapshot = link_as_hub_cache(tmp_path / "hub", sharded, shared_store)
    checkpoint = Checkpoint.open(snapshot)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert checkpoint.sidecars() == [snapshot / "tokenizer.json"]
    assert checkpoint.digest() == Checkpoint.open(sharded).digest()


def test_link_to_a_snapshot_is_followed(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(link_as_hub_cache(tmp_path / "hub", sharded))
    assert Checkpoint.open(tmp_path / "model").tensors


@pytest.mark.parametrize("target", ["blobs/other", "models--org--other/blobs/x", "models--org--name/refs/main"])
def test_hub_snapshot_may_not_link_to_anything_else(single: Path, tmp_path: Path, target: str) -> None:
    snapshot = link_as_hub_cache(tmp_path / "hub", single)
    elsewhere = tmp_path / "hub" / target
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(single / "model.safetensors", elsewhere)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(elsewhere)
    assert f"{snapshot / 'model.safetensors'}: a symlink out of the directory" in refusal(snapshot)


@pytest.mark.parametrize("renamed", ["downloads/snapshots", "models--org--name/versions"])
def test_blobs_belong_to_the_hub_cache_alone(single: Path, tmp_path: Path, renamed: str) -> None:
    snapshot = link_as_hub_cache(tmp_path / "hub", single)
    model, revisions = Path(renamed).parts
    (tmp_path / "hub" / "models--org--name" / "snapshots").rename(snapshot.parents[1] / revisions)
    snapshot.parents[1].rename(tmp_path / "hub" / model)
    assert "symlink out of the directory" in refusal(tmp_path / "hub" / renamed / snapshot.name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_a_plain_directory_are_refused(single: Path, tmp_path: Path, name: str) -> None:
    (single / name).rename(tmp_path / "outside")
    (single / name).symlink_to(tmp_path / "outside")
    assert f"{single / name}: a symlink out of the directory" in refusal(single)


def test_links_within_the_directory_are_followed(single: Path) -> None:
    (single / "weights").mkdir()
    (single / "model.safetensors").rename(single / "weights" / "model.safetensors")
    (single / "model.safetensors").symlink_to("weights/model.safetensors")
    assert Checkpoint.open(single).tensors


def test_sidecars(sharded: Path) -> None:
    carried = [
        *("LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "merges.txt"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    ]
    left = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "optimizer.pt"),
        *("consolidated.safetensors", "model.gguf", "tf_model.h5", "flax_model.msgpack", "TRAINING.BIN"),
        *(".gitattributes", ".cache/huggingface/download.lock", "original/params.json"),
    ]
    for name in carried + left:
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).write_text(name)
    assert [path.name for path in Checkpoint.open(sharded).sidecars()] == carried
    assert all(path.parent == sharded for path in Checkpoint.open(sharded).sidecars())


def test_sidecar_that_leads_out_of_the_directory(single: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (single / "tokenizer.json").symlink_to(tmp_path / "private")
    with pytest.raises(InputError, match=f"{single}/tokenizer.json: a symlink out of the directory"):
        Checkpoint.open(single).sidecars()


def test_sidecar_that_links_to_nothing(single: Path) -> None:
    (single / "tokenizer.json").symlink_to("gone")
    with pytest.raises(InputError, match=f"{single}/tokenizer.json: missing"):
        Checkpoint.open(single).sidecars()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model-00001-of-00002.pth"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({}))
    message = refusal(tmp_path)
    assert f"{tmp_path}: has only pickles ({name})" in message
    script = message.split('python -c "')[1].rstrip('"')
    compile(script, "the mend", "exec")
    assert "save_pretrained" in script
    assert "\n" not in message


def test_consolidated_pickles_need_another_layout(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    message = refusal(tmp_path)
    assert "consolidated.00.pth" in message
    assert "transformers' layout" in message


def test_safetensors_in_another_layout(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    message = refusal(tmp_path)
    assert "consolidated.safetensors" in message
    assert "transformers' layout" in message


def test_empty_directory(tmp_path: Path) -> None:
    assert f"{tmp_path}: has neither model.safetensors nor" in refusal(tmp_path)


def test_pickles_beside_safetensors_do_not_matter(single: Path) -> None:
    (single / "pytorch_model.bin").write_bytes(b"")
    assert Checkpoint.open(single).tensors
