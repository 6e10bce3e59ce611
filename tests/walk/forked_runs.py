"""Quantizations in processes of their own, whole or killed, and what is to be compared of them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourge.walk.job import FOLDER

OPTIONS = {
    "calibration": "random",
    "num_calibration_samples": 3,
    "num_probe_samples": 2,
    "max_seq_length": 12,
    "threads": 1,
}


class Zygote:
    """A process that forks quantizations: one of the scripts beside this file, crash_zygote.py or rank_zygote.py."""

    def __init__(self, script: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
        )

    def quantize(
        self,
        model: Path,
        output: Path,
        method: str = "max",
        kv_cache_scheme: str | None = None,
        smooth: bool = False,
        recipe_file: Path | None = None,
        more: Mapping[str, Any] | None = None,
        **request: Any,
    ) -> Any:
        """The script's answer to `request`; `more` options beside the usual ones."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # The methods along the curvature want more tokens than a layer has columns (96), or they fall back.
        samples = {} if method == "max" else {"num_calibration_samples": 12}
        options = OPTIONS | {"method": method, "kv_cache_scheme": kv_cache_scheme, "smooth": smooth} | samples
        # Fused loops would be loaded by every child anew.
        options |= {"backend": "torch", "recipe_file": None if recipe_file is None else str(recipe_file)}
        options |= dict(more or {})
        request |= {"model": str(model), "output": str(output), "options": options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def contents(output: Path) -> dict[str, bytes]:
    """Every file of a directory but the log of times."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != "metrics.jsonl"
    }


def committed_steps(output: Path) -> int:
    manifest = output / FOLDER / "job.json"
    return len(json.loads(manifest.read_text())["steps"]) if manifest.exists() else 0


def require_same(output: Path, whole: Path) -> None:
    ours, expected = contents(output), contents(whole)
    assert ours.keys() == expected.keys()
    for name, content in expected.items():
        assert ours[name] == content, name
