"""Every kind of local source is read, and every bad one is refused with its name and the mend."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourge.data import DataRequest, TokenSets, load_token_sets
from fourge.errors import InputError

Load = Callable[..., TokenSets]


@pytest.fixture
def load(model: Callable[..., Path], request_for: Callable[..., DataRequest], vocab_size: int) -> Load:
    """`load(source, sample=…, **request)` with the model that adds BOS and has a template."""

    def run(source: object, sample: Any = None, **changes: Any) -> TokenSets:
        return load_token_sets(request_for(source, **changes), model(), vocab_size, sample)

    return run


def as_lists(sequences: tuple[np.ndarray, ...]) -> list[list[int]]:
    return sorted(sequence.tolist() for sequence in sequences)


RECORDS = [{"text": "w1 w2"}, {"text": "w3"}, {"messages": [{"role": "user", "content": "w4"}]}]
RENDERED = ["<s> w1 w2", "<s> w3", "<user> w4 </s>"]


def write_records(path: Path) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([{"text": None, "messages": None} | r for r in RECORDS]), path)
    elif path.name == "list.json":
        path.write_text(json.dumps(RECORDS, indent=2))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(r).encode() for r in RECORDS))


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "list.json", "a.parquet", "A.JSONL"])
def test_the_same_records_in_every_kind_of_file(
    load: Load, ids: Callable[[str], list[int]], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    write_records(path)
    sets = load(path, num_calibration_samples=3)
    assert as_lists(sets.calibration.sequences) == sorted(ids(text) for text in RENDERED)
    origin = sets.provenance["calibration"]["origin"]
    assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin["records"] == 3


def test_line_separators_within_a_json_string_end_no_record(
    load: Load, ids: Callable[[str], list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1\u2028w2\u0085w3"}\n', encoding="utf-8")
    (sequence,) = load(path).calibration.sequences
    assert sequence.tolist() == ids("<s> w1 w2 w3")


def test_a_text_file_is_one_stream_cut_into_full_pieces(
    load: Load, ids: Callable[[str], list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    words = [f"w{i}" for i in range(24)]
    path.write_text(" ".join(words[:10]) + "\n\n" + " ".join(words[10:]))
    stream = ids("<s> " + " ".join(words))
    pieces = [stream[i : i + 4] for i in range(0, 24, 4)]
    sets = load(path, num_calibration_samples=4, num_probe_samples=2, max_seq_length=4)
    assert as_lists(sets.calibration.sequences + sets.probe.sequences) == sorted(pieces)
    assert sets.provenance["probe"]["origin"]["stream_tokens"] == 25
    with pytest.raises(InputError, match=r"has 6 usable pieces of 4 tokens; asked for 5 calibration and 2 probe"):
        load(path, num_calibration_samples=5, num_probe_samples=2, max_seq_length=4)


def test_a_text_file_shorter_than_a_piece_says_what_to_lower(load: Load, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(InputError, match=r"has 0 usable pieces of 64 tokens; .*lower --max-seq-length"):
        load(tmp_path / "short.txt")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.json", b"[]", "empty"),
        ("a.txt", b" \n", "empty"),
        ("a.jsonl", b'{"text": "w1 w2"}\n\n{"text": "w1\n', r"a\.jsonl, line 3: not JSON \(.* at column \d+\)"),
        ("a.json", b'[{"text": "w1"},\n  oops]', r"a\.json: not JSON \(.* at line 2, column 3\)"),
        ("a.jsonl", b'{"text": "w1 w2"}\n"w3"\n', "line 2: str where an object is wanted"),
        ("a.json", b'[{"text": "w1 w2"}, 3]', "record 2: int where an object is wanted"),
        ("a.jsonl", b'{"text": "\xff"}', r"not UTF-8 text \(byte 10\)"),
        ("a.bin", b"\x80\x81", r"not UTF-8 text \(byte 0\)"),
        ("a.parquet", b"PAR1 but no parquet", "not a parquet file"),
    ],
)
def test_bad_files_are_named_and_placed(load: Load, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"--calibration {tmp_path / name}") and "\n" not in str(caught.value)


def test_an_empty_parquet_file_is_empty(load: Load, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="empty"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "source", ["nothing.jsonl", "data/nothing.jsonl", "data/nothing.txt", "/no/such/file", "selfie"]
)
def test_a_source_that_is_nothing(load: Load, source: str) -> None:
    with pytest.raises(InputError, match=f"--calibration {source}: no such file or directory, and no hub dataset"):
        load(source)


def test_parquet_without_pyarrow_says_how_to_get_it(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'fourge\[data\]', or give a \.jsonl file"):
        load(tmp_path / "a.parquet")


def test_random_tokens_cover_the_vocabulary_evenly(load: Load, vocab_size: int) -> None:
    sets = load("random", num_calibration_samples=200, num_probe_samples=100, max_seq_length=50)
    assert {len(s) for s in sets.calibration.sequences + sets.probe.sequences} == {50}
    counts = np.bincount(sets.calibration.tokens, minlength=vocab_size)
    assert len(counts) == vocab_size
    # 10,000 draws over 100 tokens: chi² has mean 99 and deviation 14.
    chi_squared = float(((counts - 100.0) ** 2 / 100.0).sum())
    assert 40 < chi_squared < 170


def test_random_sequences_that_repeat_are_drawn_again(load: Load) -> None:
    # 10,000 sequences of 2 tokens exist: 1,500 draws repeat themselves about a hundred times.
    sets = load("random", num_calibration_samples=1000, num_probe_samples=500, max_seq_length=2)
    distinct = {s.tobytes() for s in sets.calibration.sequences + sets.probe.sequences}
    assert len(distinct) == 1500
    assert sets.provenance["calibration"]["skipped"]["repeated"] > 0
    assert sets.provenance["probe"]["skipped"]["in_calibration"] > 0


def test_self_samples_calibration_and_probe_from_seeds_of_their_own(load: Load) -> None:
    calls: list[tuple[int, int, int]] = []

    def sample(count: int, length: int, seed: int) -> list[np.ndarray]:
        calls.append((count, length, seed))
        return list(np.random.default_rng(seed).integers(100, size=(count, length)))

    sets = load("self", sample, num_calibration_samples=6, num_probe_samples=3, max_seq_length=9, seed=4)
    assert [call[:2] for call in calls] == [(6, 9), (3, 9)]
    assert calls[0][2] != calls[1][2]
    expected = np.random.default_rng(calls[0][2]).integers(100, size=(6, 9))
    assert np.array_equal(np.stack(sets.calibration.sequences), expected)
    assert {s.dtype for s in sets.probe.sequences} == {np.dtype("int32")}
    load("self", sample, num_calibration_samples=6, num_probe_samples=3, max_seq_length=9, seed=5)
    assert not {calls[0][2], calls[1][2]} & {calls[2][2], calls[3][2]}


def test_a_model_that_always_says_the_same_is_not_sampled_for_ever(load: Load) -> None:
    with pytest.raises(InputError, match=r"has 1 usable different sequences of 8 tokens \(\d+ repeated\)"):
        load(
            "self", lambda count, length, seed: [np.zeros(length)] * count, num_calibration_samples=3, max_seq_length=8
        )


def test_self_without_a_sampler_names_the_alternatives(load: Load) -> None:
    with pytest.raises(InputError, match=r"--calibration self: .*too large.*hub dataset.*local file.*'random'"):
        load("self")
    with pytest.raises(InputError, match=r"--probe self: "):
        load("random", probe_source="self", num_probe_samples=1)


def test_the_tokenizer_is_not_needed_for_random_tokens(request_for: Callable[..., DataRequest], tmp_path: Path) -> None:
    assert load_token_sets(request_for("random"), tmp_path, 10, None).calibration.num_tokens == 64


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--num-calibration-samples 0", {"num_calibration_samples": 0}),
        ("--num-probe-samples -1", {"num_probe_samples": -1}),
        ("--max-seq-length 1", {"max_seq_length": 1}),
        ("--seed -3", {"seed": -3}),
    ],
)
def test_numbers_that_make_no_sense_name_their_option(load: Load, option: str, changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=option):
        load("random", **changes)


@pytest.mark.parametrize(
    "nothing", [{"text": None}, {"text": ""}, {"messages": []}, {"prompt": "w2", "response": None}]
)
def test_records_that_say_nothing_are_skipped_and_counted(load: Load, tmp_path: Path, nothing: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in [nothing, {"text": "w1"}, nothing]))
    assert load(path).calibration.num_tokens == 2
    with pytest.raises(InputError, match=r"has 1 usable records \(2 too short\); asked for 2 calibration: lower"):
        load(path, num_calibration_samples=2)
