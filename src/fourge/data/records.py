"""Records of a local file, by number, each still as the file has it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fourge.errors import InputError

RECORD_SUFFIXES = frozenset({".jsonl", ".json", ".parquet"})
"""Files that hold records; every other file is one stream of text."""


class Rows(Protocol):
    """Records by index from 0 on; reading one gives a new dictionary."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Records:
    """`rows`, what messages call the whole (`name`) and one of them (`unit` and number), and their `origin`."""

    name: str
    rows: Rows
    origin: dict[str, Any]
    unit: str
    numbers: Sequence[int]

    @classmethod
    def counted(cls, name: str, rows: Rows, origin: dict[str, Any]) -> "Records":
        """Records that are known by their place in the source, from 1 on."""
        return cls(name, rows, origin, "record", range(1, len(rows) + 1))

    def place(self, index: int) -> str:
        """What a message calls the record at `index`."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"


def read_records(name: str, path: Path) -> Records:
    """The records of a `.jsonl`, `.json` or `.parquet` file; messages call it `name`. InputError where it is none."""
    return _read_parquet(name, path) if path.suffix.lower() == ".parquet" else _read_json(name, path)


def read_text(name: str, path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a UTF-8 file, and its origin; InputError where it is no text."""
    content = _read_bytes(name, path)
    return _decode(name, content), _origin(hashlib.sha256(content).hexdigest())


def _read_json(name: str, path: Path) -> Records:
    """One object a line, or one list of objects: told apart by the first character, whatever the file's ending."""
    content = _read_bytes(name, path)
    origin = _origin(hashlib.sha256(content).hexdigest())
    text = _decode(name, content)
    if text.lstrip().startswith("["):
        records = Records.counted(name, _parse(name, text), origin)
    else:
        # Not splitlines(): JSON allows U+2028 and other line separators inside a string.
        lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        rows = [_parse(f"{name}, line {number}", line) for number, line in lines.items()]
        records = Records(name, rows, origin, "line", tuple(lines))
    for index in range(len(records.rows)):
        row = records.rows[index]
        if not isinstance(row, dict):
            raise InputError(
                f"{records.place(index)}: {type(row).__name__} where an object is wanted; give objects with fields "
                "such as 'messages' or 'text'"
            )
    return records


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(
            f"{place}: not JSON ({error.msg} at {where}); give one object a line, or one list of objects"
        ) from error


class _TableRows:
    """Rows of a pyarrow table, made into Python objects one at a time."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int, /) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]


def _read_parquet(name: str, path: Path) -> Records:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{name}: parquet files are read by pyarrow, which is not installed; "
            "pip install 'fourge[data]', or give a .jsonl file"
        ) from error
    try:
        with path.open("rb") as file:
            origin = _origin(hashlib.file_digest(file, "sha256").hexdigest())
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name}: not a parquet file ({reason}); write it anew, or give a .jsonl file") from error
    except OSError as error:
        raise _unreadable(name, error) from error
    return Records.counted(name, _TableRows(table), origin)


def _read_bytes(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(f"{name}: cannot be read ({error.strerror or error}); check the file")


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: not UTF-8 text (byte {error.start}); convert it, or give a .jsonl, .json or .parquet file"
        ) from error


def _origin(sha256: str) -> dict[str, Any]:
    return {"kind": "file", "sha256": sha256}
