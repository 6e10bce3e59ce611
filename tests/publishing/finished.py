"""A finished checkpoint to publish, and one with a card that stands for what `fourge card` writes."""

import shutil
from pathlib import Path

import fourge
from fourge.checkpoint.folder import CARD_MARKER

CARD = f"---\nlicense: apache-2.0\ntags:\n- nvfp4\n---\n{CARD_MARKER}\n\n# A model\n\nWhat it is.\n"
OPTIONS = {"calibration": "random", "num_calibration_samples": 3, "num_probe_samples": 1, "max_seq_length": 12}


def quantize(source: Path, output: Path, **options: object) -> Path:
    fourge.quantize(str(source), output, threads=1, **(OPTIONS | options))  # type: ignore[arg-type]
    return output


def with_card(quantized: Path, output: Path) -> Path:
    shutil.copytree(quantized, output)
    (output / "README.md").write_text(CARD)
    return output


def failed(output: Path, **options: object) -> dict[str, tuple[str, ...]]:
    """What `fourge verify` finds: failures by check."""
    report = fourge.verify(output, threads=1, **options)  # type: ignore[arg-type]
    return {check.name: check.failures for check in report.checks if check.status == "failed"}


def flip_bit(path: Path, place: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(bytes(raw))
