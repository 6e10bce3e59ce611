"""Checkpoints in both layouts: ours, and one put into NVIDIA's by hand, in Model-Optimizer's own wording."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from both_layouts import LEADS_BACK, LEADS_NOWHERE, NAMES, PRODUCER, read
from safetensors.torch import save_file

import fourge


@pytest.fixture(scope="session")
def quantized(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized(architecture, scheme, ignore, **config)`: what quantize writes, once. Not to be written to."""
    made: dict[str, Path] = {}

    def get(architecture: str = "llama", scheme: Any = "NVFP4", ignore: Any = None, **changes: Any) -> Path:
        key = json.dumps([architecture, scheme, ignore, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "out"
            data = {"method": "max", "calibration": "none"}
            if scheme == "NVFP4":
                data |= {"calibration": "random", "num_calibration_samples": 3, "num_probe_samples": 1}
            source = pico(architecture, **changes)
            fourge.quantize(str(source), made[key], scheme=scheme, ignore=ignore, max_seq_length=12, threads=1, **data)
        return made[key]

    return get


@pytest.fixture
def ours(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of an NVFP4 checkpoint in compressed-tensors' layout, without its job, to be written to."""
    return Path(shutil.copytree(quantized(), tmp_path / "ours", ignore=shutil.ignore_patterns(".fourge")))


@pytest.fixture
def nvidias(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """The same in NVIDIA's layout, one file, worded as Model-Optimizer does; to be written to.

    Layer 0 has scales that lead back through their reciprocals, layer 1 has scales that do not.
    """
    source, directory = quantized(), tmp_path / "nvidias"
    directory.mkdir()
    tensors = {}
    for name, tensor in read(source).items():
        module, _, suffix = name.rpartition(".")
        renamed = f"{module}.{NAMES.get(suffix, suffix)}"
        if suffix.endswith("global_scale"):
            tensor = torch.tensor(LEADS_BACK if ".0." in name else LEADS_NOWHERE)
        tensors[renamed] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    exclude = ["lm_head", "model.embed_tok*"]
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": exclude}
    hf_quant_config = {"producer": PRODUCER, "quantization": quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(hf_quant_config, indent=4))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"ignore": exclude, "quant_algo": "NVFP4", "quant_method": "modelopt"}
    (directory / "config.json").write_text(json.dumps(config, indent=4))
    shutil.copy(source / "tokenizer.json", directory)
    return directory
