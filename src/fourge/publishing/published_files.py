"""Which files of a directory are published, and what must never be among them."""

from pathlib import Path

from fourge.checkpoint.folder import regular_file
from fourge.errors import InputError

HIDDEN = (".*", "*/.*")
"""Patterns of what stays here: the job's `.fourge`, caches, temporary files. `*` also stands for `/`."""

_LARGEST_KEY = 64 << 10
_KEY = b"PRIVATE KEY-----"


def published_files(output: Path) -> dict[str, int]:
    """Bytes by path within `output`, sorted, of every file but the hidden ones and those in hidden folders.

    Raises InputError for a symlink that leads out of the directory, and for a private key: both would publish what
    nobody meant to.
    """
    files = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if any(part.startswith(".") for part in name.parts) or path.is_dir():
            continue
        size = regular_file(output, name.as_posix()).stat().st_size
        if size <= _LARGEST_KEY and _KEY in path.read_bytes():
            raise InputError(f"{path}: holds a private key, and this directory is published; move it elsewhere")
        files[name.as_posix()] = size
    return files
