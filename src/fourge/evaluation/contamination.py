"""Whether calibration text holds benchmark items: word sequences (13 words) that both have.

A model calibrated on the questions that it is then scored on is flattered. Words are compared without case and
punctuation. 13 is the length of GPT-3's check (arXiv 2005.14165, appendix C).
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fourge.errors import InputError

NGRAM = 13
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_PIECE = 1 << 20
"""Characters of a text file that are looked at together."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Contamination:
    """What was found. By task: `items` that share a sequence of `ngram` words with the text of `checked_against`,
    their `doc_ids`, how many were `checked`, and how many of those are `too_short` to have such a sequence.

    Where nothing could be checked, `checked_against` is None, the rest empty, and `not_checked` says why.
    """

    ngram: int
    checked_against: str | None
    items: dict[str, int]
    doc_ids: dict[str, list[int]]
    checked: dict[str, int]
    too_short: dict[str, int]
    not_checked: str | None = None

    @classmethod
    def unknown(cls, why: str) -> Self:
        """The record of a check that could not be made."""
        return cls(NGRAM, None, {}, {}, {}, {}, why)


class NgramIndex:
    """All sequences of `ngram` words of some texts, as sorted 64-bit hashes: 8 bytes each, whatever the words.

    Two different sequences share a hash with a chance of 2⁻⁶⁴ a pair.
    """

    def __init__(self, texts: Iterable[str], ngram: int = NGRAM) -> None:
        self.ngram = ngram
        self._hashes: Hashes = np.empty(0, np.uint64)
        waiting: list[Hashes] = []
        size = 0
        for text in texts:
            waiting.append(ngram_hashes(text, ngram))
            size += len(waiting[-1])
            # Merged when there is as much as was merged before: every hash is sorted a few times, not once a text.
            if size > max(len(self._hashes), _PIECE):
                self._merge(waiting)
                waiting, size = [], 0
        self._merge(waiting)

    def _merge(self, waiting: list[Hashes]) -> None:
        self._hashes = np.unique(np.concatenate([self._hashes, *waiting]))

    def __len__(self) -> int:
        return len(self._hashes)

    def holds_any(self, hashes: Hashes) -> bool:
        """Whether one of these sequences is in the texts; as `ngram_hashes` gives them."""
        if not len(self._hashes):
            return False
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return bool((self._hashes[places] == hashes).any())


def ngram_hashes(text: str, ngram: int = NGRAM) -> Hashes:
    """uint64 `[words − ngram + 1]`, one for every sequence of `ngram` words of a text; empty where it has fewer."""
    words = np.array([_word_hash(word) for word in normalised_words(text)], np.uint64)
    count = len(words) - ngram + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(ngram):
        hashes = hashes * _MULTIPLIER + words[offset : offset + count]
    return hashes


def normalised_words(text: str) -> list[str]:
    """Letters and digits in lower case, compatibility forms of Unicode folded, punctuation left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def check_contamination(
    index: NgramIndex, checked_against: str, tasks: Mapping[str, Iterable[tuple[int, Mapping[str, Any]]]]
) -> Contamination:
    """Holds every text in the documents of `tasks` (each with its `doc_id`) against `index`.

    `checked_against` says what the index was made of. Few-shot examples are no part of a document, and so not of it.
    """
    found: dict[str, list[int]] = {}
    checked, too_short = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)
    for task, docs in tasks.items():
        found[task] = []
        for doc_id, doc in docs:
            hashes = np.concatenate([np.empty(0, np.uint64), *(ngram_hashes(t, index.ngram) for t in _texts(doc))])
            checked[task] += 1
            too_short[task] += not len(hashes)
            if index.holds_any(hashes):
                found[task].append(doc_id)
    counts = {task: len(doc_ids) for task, doc_ids in found.items()}
    return Contamination(index.ngram, checked_against, counts, found, checked, too_short)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a document, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _texts(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _texts(member)


def calibration_texts(source: Path) -> Iterator[str]:
    """The text that a model was calibrated on: the tokens that a quantized directory kept, decoded; or a file's text.

    Files are as for `fourge quantize --calibration`: records (every string in them), or one text in UTF-8.

    Raises InputError where there is neither.
    """
    from fourge.data.records import RECORD_SUFFIXES, read_records
    from fourge.walk.job import FOLDER

    if source.is_dir():
        tokens = source / FOLDER / "tokens.safetensors"
        if not tokens.is_file():
            raise InputError(f"{tokens}: no calibration tokens were kept; name the calibration text itself")
        return _decoded(tokens, source)
    if not source.is_file():
        raise InputError(f"{source}: no such file or directory; name a quantized directory, or a file of text")
    if source.suffix.lower() in RECORD_SUFFIXES:
        rows = read_records(str(source), source).rows
        return (text for index in range(len(rows)) for text in _texts(rows[index]))
    return _pieces(source)


def _decoded(tokens: Path, model: Path) -> Iterator[str]:
    from fourge.data import read_token_sets
    from fourge.data.render import load_tokenizer

    tokenizer = load_tokenizer(model)
    for sequence in read_token_sets(tokens).calibration.sequences:
        yield tokenizer.decode(sequence.tolist(), skip_special_tokens=True)


def _pieces(path: Path) -> Iterator[str]:
    """A text file in pieces, each beginning with the last words of the one before it: no sequence is lost between."""
    carried = ""
    with path.open(encoding="utf-8") as file:
        try:
            while piece := file.read(_PIECE):
                text = carried + piece
                yield text
                carried = text[-64 * NGRAM :].partition(" ")[2]
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a text in UTF-8 ({error.reason}); name the calibration text") from error
