"""Which records are taken: as many as asked, none twice, none in both sets, the same ones again tomorrow."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourge.data import DataRequest, TokenSets, load_token_sets
from fourge.errors import InputError

Load = Callable[..., TokenSets]


@pytest.fixture(scope="session")
def load(model: Callable[..., Path], request_for: Callable[..., DataRequest], vocab_size: int) -> Load:
    def run(source: object, **changes: Any) -> TokenSets:
        return load_token_sets(request_for(source, **changes), model(), vocab_size, None)

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def keys(sequences: Iterable[Any]) -> list[tuple[int, ...]]:
    return [tuple(sequence.tolist()) for sequence in sequences]


ROLES = ("calibration", "validation", "probe")
DISTINCT = [f"w{i} w{i}" for i in range(60)]

few_words = st.lists(st.integers(0, 2), max_size=3).map(lambda numbers: " ".join(f"w{i}" for i in numbers))


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(few_words, min_size=1, max_size=25),
    asked=st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(0, 8)),
    seed=st.integers(0, 2**64),
    length=st.integers(2, 5),
)
def test_nothing_is_taken_twice_and_everything_usable_can_be(
    load: Load, folder: Path, texts: list[str], asked: tuple[int, int, int], seed: int, length: int
) -> None:
    path = write_texts(folder / "few.jsonl", texts)
    # The vocabulary starts with <unk> <s> </s> <user> <assistant>; the model adds <s>, and nothing to no text.
    usable = {(1, *(5 + int(word[1:]) for word in text.split()))[:length] for text in texts if text}
    sizes = {f"num_{role}_samples": count for role, count in zip(ROLES, asked, strict=True)} | {
        "max_seq_length": length
    }
    if len(usable) < sum(asked):
        with pytest.raises(InputError, match=f"has {len(usable)} usable records"):
            load(path, seed=seed, **sizes)
        return
    sets = load(path, seed=seed, **sizes)
    taken = [keys(getattr(sets, role).sequences) for role in ROLES]
    assert tuple(map(len, taken)) == asked
    together = {sequence for sequences in taken for sequence in sequences}
    assert len(together) == sum(asked)
    assert together <= usable


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(few_words, min_size=1, max_size=25),
    other=st.lists(few_words, min_size=1, max_size=25),
    seed=st.integers(0, 1000),
)
def test_a_probe_from_elsewhere_leaves_out_what_is_in_the_calibration_set(
    load: Load, folder: Path, texts: list[str], other: list[str], seed: int
) -> None:
    ours, theirs = write_texts(folder / "ours.jsonl", texts), write_texts(folder / "theirs.jsonl", other)
    try:
        sets = load(ours, num_calibration_samples=3, num_probe_samples=2, seed=seed, probe_source=str(theirs))
    except InputError as error:
        assert ("--calibration" in str(error)) == (len({text for text in texts if text}) < 3)
        return
    calibration, probe = keys(sets.calibration.sequences), keys(sets.probe.sequences)
    assert len(set(probe) - set(calibration)) == 2
    # A source of its own or the probe's: what calibration takes is the same.
    assert calibration == keys(load(ours, num_calibration_samples=3, seed=seed).calibration.sequences)


def test_the_counts_say_what_was_left_out_and_why(load: Load, tmp_path: Path) -> None:
    ours = write_texts(tmp_path / "ours.jsonl", ["w1", "w1", "w1", "w2", "", ""])
    theirs = write_texts(tmp_path / "theirs.jsonl", ["w1", "w2", "w2", "w3", "w3", ""])
    with pytest.raises(InputError) as caught:
        load(ours, num_calibration_samples=2, num_probe_samples=2, probe_source=str(theirs))
    # Which duplicates come before the last new one is the seed's affair; with too few, all records were looked at.
    assert str(caught.value) == (
        f"--probe {theirs} has 1 usable records (1 too short, 1 repeated, 3 in calibration); asked for 2 probe: "
        "lower --num-probe-samples, or name a larger source"
    )
    with pytest.raises(InputError) as caught:
        load(ours, num_calibration_samples=2, num_probe_samples=1)
    assert str(caught.value).startswith(f"--calibration {ours} has 2 usable records (2 too short, ")
    assert str(caught.value).endswith(
        "asked for 2 calibration and 1 probe: lower --num-calibration-samples / --num-probe-samples, "
        "or name a larger source"
    )


def test_the_order_is_pcg64_s_permutation(load: Load, tmp_path: Path, ids: Callable[[str], list[int]]) -> None:
    """Written down, not computed: what a seed chooses must not change with a new version of anything."""
    path = write_texts(tmp_path / "ten.jsonl", [f"w{i}" for i in range(10)])
    sets = load(path, num_calibration_samples=3, num_probe_samples=2)
    assert [s.tolist() for s in sets.calibration.sequences] == [ids(f"<s> {w}") for w in ("w4", "w6", "w2")]
    assert [s.tolist() for s in sets.probe.sequences] == [ids(f"<s> {w}") for w in ("w1", "w8")]


@pytest.mark.parametrize("source", ["records", "random", "text"])
def test_same_request_same_tokens_other_seed_other_tokens(load: Load, tmp_path: Path, source: str) -> None:
    path: object = source
    if source == "records":
        path = write_texts(tmp_path / "a.jsonl", DISTINCT)
    elif source == "text":
        path = tmp_path / "a.txt"
        path.write_text(" ".join(f"w{i * i % 95}" for i in range(400)))
    sizes = {"num_calibration_samples": 8, "num_probe_samples": 4, "max_seq_length": 8}
    first, again, other = load(path, **sizes), load(path, **sizes), load(path, seed=1, **sizes)
    assert first.provenance == again.provenance
    assert keys(first.calibration.sequences) == keys(again.calibration.sequences)
    assert keys(first.probe.sequences) == keys(again.probe.sequences)
    assert first.calibration.digest() != other.calibration.digest()
    assert first.probe.digest() != other.probe.digest()


@pytest.mark.parametrize("source", ["records", "random"])
def test_more_calibration_adds_to_it_and_leaves_the_probe(load: Load, tmp_path: Path, source: str) -> None:
    path: object = source if source == "random" else write_texts(tmp_path / "a.jsonl", DISTINCT)
    few = load(path, num_calibration_samples=5, num_probe_samples=7)
    many = load(path, num_calibration_samples=40, num_probe_samples=7)
    more_probe = load(path, num_calibration_samples=5, num_probe_samples=9)
    assert keys(many.calibration.sequences)[:5] == keys(few.calibration.sequences)
    assert many.probe.digest() == few.probe.digest()
    assert keys(more_probe.probe.sequences)[:7] == keys(few.probe.sequences)
    assert more_probe.calibration.digest() == few.calibration.digest()


@pytest.mark.parametrize("source", ["records", "random"])
def test_validation_leaves_the_other_sets_as_they_were(load: Load, tmp_path: Path, source: str) -> None:
    """And the probe leaves validation as it was: what chooses does not depend on what is reported."""
    path: object = source if source == "random" else write_texts(tmp_path / "a.jsonl", DISTINCT)
    without = load(path, num_calibration_samples=5, num_probe_samples=7)
    sets = load(path, num_calibration_samples=5, num_validation_samples=6, num_probe_samples=7)
    assert sets.calibration.digest() == without.calibration.digest()
    assert sets.probe.digest() == without.probe.digest()
    other_probe = load(path, num_calibration_samples=5, num_validation_samples=6, num_probe_samples=2)
    assert other_probe.validation.digest() == sets.validation.digest()
    assert sets.provenance["validation"]["sequences"] == 6


def test_the_probe_leaves_out_what_validation_has(load: Load, tmp_path: Path) -> None:
    """A probe source of its own that holds the same records: all are distinct, so what is left is known."""
    path = write_texts(tmp_path / "a.jsonl", DISTINCT[:10])
    sizes = {"num_calibration_samples": 2, "num_validation_samples": 3}
    sets = load(path, num_probe_samples=5, probe_source=str(path), **sizes)
    assert len({*keys(sets.calibration.sequences), *keys(sets.validation.sequences), *keys(sets.probe.sequences)}) == 10
    with pytest.raises(InputError, match=r"2 in calibration, 3 in validation"):
        load(path, num_probe_samples=6, probe_source=str(path), **sizes)


def test_naming_the_same_source_for_the_probe_holds_out_the_same_records(load: Load, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", DISTINCT)
    held_out = load(path, num_calibration_samples=5, num_probe_samples=7)
    named = load(path, num_calibration_samples=5, num_probe_samples=7, probe_source=str(path))
    assert named.probe.digest() == held_out.probe.digest()


def test_the_provenance_is_json_and_says_what_was_taken(load: Load, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", DISTINCT)
    sets = load(path, num_calibration_samples=5, num_probe_samples=7, probe_source="random", seed=3)
    provenance = json.loads(json.dumps(sets.provenance))
    assert provenance == sets.provenance
    assert [provenance[key] for key in ("source", "probe_source", "seed", "max_seq_length")] == [
        str(path),
        "random",
        3,
        64,
    ]
    assert provenance["calibration"]["sequences"] == 5
    assert provenance["calibration"]["tokens"] == 15
    assert provenance["probe"]["tokens"] == 7 * 64
    assert provenance["probe"]["sha256"] == sets.probe.digest()
    assert provenance["probe"]["origin"]["kind"] == "random"
