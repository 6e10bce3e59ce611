"""The contamination check: items planted in calibration text are found, and nothing else is."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import choice_record, write_run

import fourge
from fourge import InputError
from fourge.evaluation.contamination import (
    NGRAM,
    Contamination,
    NgramIndex,
    calibration_texts,
    check_contamination,
    ngram_hashes,
    normalised_words,
)
from fourge.evaluation.runs import open_run
from fourge.evaluation.samples import read_docs
from fourge.report.evaluation_text import contamination_lines

LEXICON = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


def sentence(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(LEXICON, k=words))


def found(texts: list[str], doc: Any) -> bool:
    index = NgramIndex(texts)
    return bool(check_contamination(index, "here", {"quiz": [(0, doc)]}).items["quiz"])


def test_planted_items_are_found_among_others() -> None:
    docs = [{"question": sentence(i, 20), "choices": [sentence(1000 + i, 3)]} for i in range(300)]
    planted = [7, 42, 299]
    texts = [f"{sentence(5000 + i, 400)} {docs[i]['question']} {sentence(6000 + i, 30)}" for i in planted]
    texts += [sentence(9000 + i, 800) for i in range(20)]
    result = check_contamination(NgramIndex(texts), "the text", {"quiz": enumerate(docs), "empty": []})
    assert result.doc_ids == {"quiz": planted, "empty": []}
    assert result.items == {"quiz": 3, "empty": 0}
    assert result.checked == {"quiz": 300, "empty": 0}
    assert result.too_short == {"quiz": 0, "empty": 0}
    assert (result.ngram, result.checked_against) == (13, "the text")


def test_thirteen_words_and_no_fewer() -> None:
    question = sentence(1, 40)
    words = question.split()
    assert found([f"x y {' '.join(words[10:23])} z"], {"question": question})
    assert not found([f"x y {' '.join(words[10:22])} z"], {"question": question})
    # The same words are not the same sequence.
    assert not found([" ".join(reversed(words))], {"question": question})


def test_against_sets_of_word_tuples() -> None:
    """The textbook's way: a set of tuples of words."""
    generator = random.Random(3)
    few = LEXICON[:3]  # sequences of three words meet by themselves
    text = " ".join(generator.choices(few, k=4000))
    docs = [" ".join(generator.choices(few, k=generator.randint(8, 18))) for _ in range(400)]

    def tuples(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    known = tuples(text.split())
    expected = [i for i, doc in enumerate(docs) if tuples(doc.split()) & known]
    result = check_contamination(NgramIndex([text], 8), "", {"t": [(i, {"q": doc}) for i, doc in enumerate(docs)]})
    assert result.doc_ids["t"] == expected
    assert 0 < len(expected) < 400
    assert len(NgramIndex([text], 8)) == len(known)


def test_case_punctuation_and_forms_of_letters_do_not_hide_an_item() -> None:
    question = "The quick brown fox, it is said, jumps over 3 lazy dogs every fine Monday morning."
    assert found(
        ["THE QUICK “BROWN” FOX it is said — jumps over 3 lazy dogs every ﬁne monday: morning!"], {"q": question}
    )
    assert normalised_words("Straße, ﬁne №1!") == ["strasse", "fine", "no1"]


def test_texts_are_looked_at_one_by_one_however_deep() -> None:
    question = sentence(2, 30)
    half = question.split()[:12]
    assert found([question], {"id": 3, "nested": {"list": [{"ctx": question}, None]}})
    # Two texts beside each other make no sequence.
    assert not found([question], {"a": " ".join(half), "b": " ".join(question.split()[12:18])})


def test_items_too_short_are_counted() -> None:
    docs = [(0, {"q": "only a few words"}), (1, {"q": sentence(4, 13)}), (2, {"q": ""}), (3, {})]
    result = check_contamination(NgramIndex([sentence(5, 100)]), "", {"quiz": docs})
    assert (result.too_short, result.checked) == ({"quiz": 3}, {"quiz": 4})
    assert check_contamination(NgramIndex([]), "", {"quiz": docs}).items == {"quiz": 0}


def test_memory_is_eight_bytes_a_sequence() -> None:
    texts = (sentence(i, 2000) for i in range(800))
    index = NgramIndex(texts)
    assert len(index) == 800 * (2000 - NGRAM + 1)
    assert index._hashes.nbytes == 8 * len(index)
    assert index.holds_any(ngram_hashes(sentence(799, 2000))) and index.holds_any(ngram_hashes(sentence(0, 2000)))


def test_a_large_file_is_read_in_pieces_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fourge.evaluation.contamination as room

    monkeypatch.setattr(room, "_PIECE", 1500)
    text = sentence(8, 6000)
    (tmp_path / "text.txt").write_text(text)
    index = NgramIndex(calibration_texts(tmp_path / "text.txt"))
    expected = ngram_hashes(text)
    assert all(index.holds_any(expected[i : i + 1]) for i in range(len(expected)))


def test_records_are_taken_by_their_texts(tmp_path: Path) -> None:
    """In the raw line of a record a line break is a backslash and an n, and would cut words short."""
    question = sentence(9, 30)
    broken = "\n".join(question.split())
    (tmp_path / "calibration.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": broken}]}) + "\n")
    assert found(list(calibration_texts(tmp_path / "calibration.jsonl")), {"q": question})


def test_a_quantized_directory_keeps_what_it_was_calibrated_on(tmp_path: Path, pico: Callable[..., Path]) -> None:
    """From a real quantization to the warning; the tokens are decoded by the directory's own tokenizer."""
    generator = np.random.default_rng(0)
    words = [left + right for left in "bdfgkl" for right in ("a", "e", "i", "o", "u")]
    text = " ".join(words[i] for i in generator.integers(len(words), size=3000))
    (tmp_path / "text.txt").write_text(text)
    options = {"num_calibration_samples": 4, "num_probe_samples": 1, "max_seq_length": 64, "threads": 1}
    fourge.quantize(str(pico("llama")), tmp_path / "out", calibration=str(tmp_path / "text.txt"), **options)

    from fourge.data import read_token_sets

    kept = read_token_sets(tmp_path / "out" / ".fourge" / "tokens.safetensors")
    names = {
        i: word for word, i in json.loads((pico("llama") / "tokenizer.json").read_text())["model"]["vocab"].items()
    }
    planted = " ".join(names[int(token)] for token in kept.calibration.sequences[2][20:40])
    probed = " ".join(names[int(token)] for token in kept.probe.sequences[0][20:40])
    records = [choice_record(i, 1, prompt=prompt) for i, prompt in enumerate((planted, probed, sentence(1, 20)))]
    run = open_run(write_run(tmp_path / "lane", {"quiz": records}))

    index = NgramIndex(calibration_texts(tmp_path / "out"))
    result = check_contamination(index, "out", {task: read_docs(task, source) for task, source in run.samples.items()})
    assert result.doc_ids == {"quiz": [0]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "tokens.safetensors: no calibration tokens were kept"),
        ("nowhere.txt", "no such file or directory"),
        ("latin.txt", "not a text in UTF-8"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    with pytest.raises(InputError, match=message):
        list(calibration_texts(tmp_path / name))


def test_the_warning() -> None:
    record = {"ngram": 13, "checked_against": "OUT", "items": {"mmlu": 0, "gsm8k": 2, "arc_easy": 1}}
    assert contamination_lines(record) == [
        "WARNING: 3 items share 13 words in a row with OUT, the calibration text: gsm8k 2, arc_easy 1"
    ]
    assert contamination_lines(record | {"items": {"mmlu": 0}}) == [
        "contamination: no item shares 13 words in a row with OUT"
    ]
    assert contamination_lines(None) == []


def test_what_was_not_checked_is_said() -> None:
    unknown = asdict(Contamination.unknown("OUT kept no calibration tokens"))
    assert contamination_lines(unknown) == ["contamination: not checked (OUT kept no calibration tokens)"]
