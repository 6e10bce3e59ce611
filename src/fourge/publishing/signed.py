"""A signature ends with the first file under it that changes: that is refused, not done in silence."""

from pathlib import Path

from fourge.checkpoint.folder import SIGNATURE
from fourge.errors import InputError


def require_unsigned(output: Path, path: Path, content: bytes) -> None:
    """Raises InputError where `output` is signed, and `path`, a file in it, is to become other than it is."""
    signature = output / SIGNATURE
    covered = path.resolve().is_relative_to(output.resolve())
    if covered and signature.exists() and not (path.is_file() and path.read_bytes() == content):
        raise InputError(
            f"{signature} would no longer hold, {path.name} would change: delete it, do this again, then sign again"
        )
