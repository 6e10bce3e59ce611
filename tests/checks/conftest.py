"""Good checkpoints to damage, and the damaged copies of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourge
from fourge import VerifyReport

INDEX = "model.safetensors.index.json"


class Copy:
    """A checkpoint's directory to be written to, edited with safetensors' own reader and writer."""

    def __init__(self, directory: Path, source: Path) -> None:
        self.directory = directory
        self.source = source

    def verify(self, **options: Any) -> VerifyReport:
        return fourge.verify(self.directory, threads=1, **options)

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.directory / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def edit_config(self, change: Callable[[dict[str, Any]], object]) -> None:
        """`change` gets the one group of `quantization_config` and may edit it."""
        self.edit_json("config.json", lambda c: change(c["quantization_config"]["config_groups"]["group_0"]))

    def shard_of(self, name: str) -> Path:
        """The file that holds `name`, or would, by its layer."""
        weight_map = json.loads((self.directory / INDEX).read_text())["weight_map"]
        like = next(key for key in weight_map if key == name or key.split(".")[:3] == name.split(".")[:3])
        return self.directory / weight_map[like]

    def replace(self, name: str, new: torch.Tensor | None) -> None:
        """Puts `new` in the place of tensor `name`, in its shard and the index; None removes it."""
        path = self.shard_of(name)
        tensors = load_file(path)
        if new is None:
            del tensors[name]
            self.edit_json(INDEX, lambda index: index["weight_map"].pop(name))
        else:
            tensors[name] = new.contiguous()
            self.edit_json(INDEX, lambda index: index["weight_map"].update({name: path.name}))
        save_file(tensors, path, metadata={"format": "pt"})

    def change(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces tensor `name` by what `change` makes of it."""
        self.replace(name, change(load_file(self.shard_of(name))[name]))

    def forget_job(self) -> None:
        """Without a job there are no digests, which would find any damage at all."""
        shutil.rmtree(self.directory / ".fourge")


@pytest.fixture(scope="session")
def quantized(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`quantized(architecture, scheme, kv_cache_scheme, smooth, **config)`: source and output, made once.

    Not to be changed.
    """
    made: dict[str, tuple[Path, Path]] = {}

    def get(
        architecture: str = "llama",
        scheme: str = "NVFP4",
        kv_cache_scheme: str | None = None,
        smooth: bool = False,
        **changes: Any,
    ) -> tuple[Path, Path]:
        key = json.dumps([architecture, scheme, kv_cache_scheme, smooth, changes], sort_keys=True)
        if key not in made:
            source, output = pico(architecture, **changes), tmp_path_factory.mktemp("quantized") / "out"
            fourge.quantize(
                str(source),
                output,
                scheme=scheme,  # type: ignore[arg-type]
                kv_cache_scheme=kv_cache_scheme,  # type: ignore[arg-type]
                method="max",
                smooth=smooth,
                calibration="random",
                num_calibration_samples=4,
                num_probe_samples=2,
                max_seq_length=16,
                threads=1,
            )
            made[key] = (source, output)
        return made[key]

    return get


@pytest.fixture
def copy(quantized: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Callable[..., Copy]:
    """`copy(architecture, scheme, **config)`: a finished checkpoint that the test may damage, with its job."""

    def get(*args: Any, **changes: Any) -> Copy:
        source, output = quantized(*args, **changes)
        # Without the record of all files, by which any change at all is found; tests/publishing is about that one.
        ignored = shutil.ignore_patterns("fourge.json")
        return Copy(Path(shutil.copytree(output, tmp_path / "copy", ignore=ignored)), source)

    return get
