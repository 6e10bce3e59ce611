"""From what the user names to a pool of token sequences, in the order in which they are to be taken."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fourge.data.hub import is_hub_source, load_hub_records, load_saved_records
from fourge.data.records import RECORD_SUFFIXES, Records, read_records, read_text
from fourge.data.render import Renderer, load_tokenizer
from fourge.errors import InputError

Sample = Callable[[int, int, int], list[np.ndarray]]
"""`sample(count, length, seed)`: sequences of `length` tokens drawn from the model itself."""

_ROUNDS = 8
"""How often drawing is repeated when what was drawn had been drawn before."""


@dataclass(frozen=True)
class Pool:
    """Candidates for the three sets; no record, piece or draw is given twice.

    All may give too short sequences, and equal ones: that is for the taker to judge. `name` is the option with
    its value; `unit` and `mend` complete the sentence that there are too few.
    """

    name: str
    unit: str
    mend: str
    origin: dict[str, Any]
    calibration: Iterator[np.ndarray]
    validation: Iterator[np.ndarray]
    probe: Iterator[np.ndarray]


@dataclass(frozen=True)
class Workbench:
    """What turns a source into sequences: the model's tokenizer (loaded when needed), its vocabulary, the sizes."""

    model_directory: Path
    vocab_size: int
    sample: Sample | None
    max_seq_length: int
    seed: int
    num_calibration_samples: int
    num_validation_samples: int
    num_probe_samples: int

    @cached_property
    def renderer(self) -> Renderer:
        tokenizer = load_tokenizer(self.model_directory)
        return Renderer(tokenizer, self.model_directory, self.vocab_size, self.max_seq_length)


def open_pool(option: str, source: str, bench: Workbench) -> Pool:
    """The pool that `source`, given as `option`, names. Raises InputError where it names nothing usable."""
    name = f"{option} {source}"
    path = Path(source).expanduser()
    if source == "random":
        return _random_pool(name, bench)
    if source == "self":
        return _self_pool(name, bench)
    if path.is_file():
        if path.suffix.lower() in RECORD_SUFFIXES:
            return _record_pool(read_records(name, path), bench)
        return _text_pool(name, path, bench)
    if path.is_dir():
        return _record_pool(load_saved_records(name, path, None), bench)
    directory, _, split = source.rpartition(":")
    if directory and Path(directory).expanduser().is_dir():
        return _record_pool(load_saved_records(name, Path(directory).expanduser(), split), bench)
    if is_hub_source(source) and path.suffix.lower() not in RECORD_SUFFIXES | {".txt"}:
        return _record_pool(load_hub_records(name, source), bench)
    raise InputError(
        f"{name}: no such file or directory, and no hub dataset's name (ORG/NAME, ORG/NAME:SPLIT); check the spelling"
    )


class _Deck:
    """The numbers below `size`, shuffled by `seed` and dealt from both ends: none is dealt twice."""

    def __init__(self, size: int, seed: int) -> None:
        # PCG64 by name: the same order on every platform.
        self._order = np.random.Generator(np.random.PCG64(seed)).permutation(size)
        self._top, self._bottom = 0, size

    def from_top(self) -> Iterator[int]:
        while self._top < self._bottom:
            self._top += 1
            yield int(self._order[self._top - 1])

    def from_bottom(self) -> Iterator[int]:
        while self._top < self._bottom:
            self._bottom -= 1
            yield int(self._order[self._bottom])


def _record_pool(records: Records, bench: Workbench) -> Pool:
    if not len(records.rows):
        raise InputError(f"{records.name}: empty; name a source with records in it")
    renderer = bench.renderer

    def render(index: int) -> np.ndarray:
        return renderer.record(records.rows[index], records.place(index))

    deck = _Deck(len(records.rows), bench.seed)
    return Pool(
        records.name,
        "records",
        "name a larger source",
        {**records.origin, "records": len(records.rows), "chat_template": renderer.has_chat_template},
        map(render, deck.from_top()),
        map(render, deck.from_top()),
        map(render, deck.from_bottom()),
    )


def _text_pool(name: str, path: Path, bench: Workbench) -> Pool:
    """The file as one stream of tokens, cut into full pieces; what is left at the end is dropped."""
    text, origin = read_text(name, path)
    if not text.strip():
        raise InputError(f"{name}: empty; name a source with text in it")
    tokens = bench.renderer.stream(text, name)
    length = bench.max_seq_length
    pieces = tokens[: len(tokens) // length * length].reshape(-1, length)
    deck = _Deck(len(pieces), bench.seed)
    return Pool(
        name,
        f"pieces of {length} tokens",
        "lower --max-seq-length, or name a larger source",
        {**origin, "stream_tokens": len(tokens)},
        map(pieces.__getitem__, deck.from_top()),
        map(pieces.__getitem__, deck.from_top()),
        map(pieces.__getitem__, deck.from_bottom()),
    )


def _random_pool(name: str, bench: Workbench) -> Pool:
    def draw(role: int, count: int) -> Iterator[np.ndarray]:
        generator = np.random.Generator(np.random.PCG64([bench.seed, role]))
        for _ in range(_ROUNDS * count):
            yield generator.integers(bench.vocab_size, size=bench.max_seq_length, dtype=np.int32)

    return _drawn_pool(name, {"kind": "random", "vocab_size": bench.vocab_size}, draw, bench)


def _self_pool(name: str, bench: Workbench) -> Pool:
    sample = bench.sample
    if sample is None:
        raise InputError(
            f"{name}: the model is too large to sample text from it on this machine; name a hub dataset, a local "
            "file (.jsonl, .json, .parquet or text), or 'random'"
        )

    def draw(role: int, count: int) -> Iterator[np.ndarray]:
        for turn in range(_ROUNDS):
            seed = np.random.SeedSequence([bench.seed, role, turn]).generate_state(1)[0]
            yield from sample(count, bench.max_seq_length, int(seed))

    return _drawn_pool(name, {"kind": "self"}, draw, bench)


def _drawn_pool(
    name: str, origin: dict[str, Any], draw: Callable[[int, int], Iterator[np.ndarray]], bench: Workbench
) -> Pool:
    """`draw(role, count)` draws for calibration (role 0), the probe (1) or validation (2), each by seeds of its own."""
    return Pool(
        name,
        f"different sequences of {bench.max_seq_length} tokens",
        "raise --max-seq-length",
        origin,
        draw(0, bench.num_calibration_samples),
        draw(2, bench.num_validation_samples),
        draw(1, bench.num_probe_samples),
    )
