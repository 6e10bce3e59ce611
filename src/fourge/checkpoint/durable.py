"""Files that are whole after a power cut: written beside their place, forced to disk, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourge.errors import InputError


def fsync_directory(path: Path) -> None:
    """Forces the folder's entries, and so the renames within it, to disk."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def replace_durably(temporary: Path, final: Path) -> None:
    """Puts `temporary` in `final`'s place: at every instant `final` is the old file or all of the new one.

    Both must lie on one file system. When it returns, the new file survives a power cut.
    """
    _fsync(temporary, os.O_RDONLY)
    temporary.replace(final)
    fsync_directory(final.parent)


def write_json(path: Path, content: object) -> None:
    """Replaces `path` durably by `content` as JSON; see `json_text`."""
    with replaced(path) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


def json_text(content: object) -> str:
    """The text that `write_json` writes: keys sorted, indented by 2, newline at the end."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def copy_file(source: Path, target: Path) -> None:
    """Replaces `target` durably by a copy of `source`'s content; a symlink is followed."""
    with replaced(target) as temporary:
        shutil.copyfile(source, temporary)


def nearest_existing(path: Path) -> Path:
    """`path` itself, or the nearest of its parents that is there: where its disk can be asked about."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def replaced(final: Path) -> Iterator[Path]:
    """A temporary name in `final`'s folder, put in its place durably at the end and removed on an exception."""
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        yield temporary
        replace_durably(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors_named(output: Path) -> Iterator[None]:
    """A disk that is full, gone or read-only, while `output` is written, is the user's to mend: an InputError.

    For verbs of which the same command continues; what they had committed before is whole.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise InputError(
            f"{error.filename or output}: {error.strerror}; make room, then the same command continues"
        ) from error


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
