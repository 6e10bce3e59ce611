"""A walk over requests that is killed, continued, repeated, damaged, or asked for something else."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fourge
from fourge.errors import InputError
from fourge.evaluation.engine import WalkEngine, WalkSettings
from fourge.evaluation.requests import score_request
from fourge.evaluation.scoring_job import ScoringJob


class Zygote:
    """A process that forks walks; see kill_zygote.py."""

    def __init__(self, model: Path, quantized: Path) -> None:
        self._models = {"model": str(model), "quantized": str(quantized)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kill_zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def walk(self, folder: Path, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._models | {"folder": str(folder)} | request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def models(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    output = tmp_path_factory.mktemp("quantized") / "out"
    sets: dict[str, Any] = {"num_calibration_samples": 4, "num_probe_samples": 1, "max_seq_length": 24}
    fourge.quantize(str(pico()), output, method="max", calibration="random", threads=1, **sets)
    return pico(), output


@pytest.fixture(scope="module")
def zygote(models: tuple[Path, Path]) -> Iterator[Zygote]:
    process = Zygote(*models)
    yield process
    process.close()


def test_killed_at_any_commit_it_continues_to_the_same_bits(zygote: Zygote, tmp_path: Path) -> None:
    whole = zygote.walk(tmp_path / "whole")
    assert whole["killed_by"] is None and whole["operations"] > 30
    for point in range(1, whole["operations"] + 1, 3):
        folder = tmp_path / f"killed-{point}"
        assert zygote.walk(folder, kill_before=point)["killed_by"] == signal.SIGKILL
        continued = zygote.walk(folder)
        assert continued["killed_by"] is None, f"killed before operation {point}, it did not continue"
        assert continued["scores"] == whole["scores"] and continued["kl_div"] == whole["kl_div"]
        assert {path.name for path in (folder / "walk").iterdir()} == {
            *("job.json", "answers.npz", "metrics.jsonl", "lock")
        }
        shutil.rmtree(folder)


def test_killed_twice_before_the_last_commit_it_reads_only_what_is_left(zygote: Zygote, tmp_path: Path) -> None:
    whole = zygote.walk(tmp_path / "whole")
    killed = tmp_path / "killed"
    late = whole["operations"] - 12
    assert zygote.walk(killed, kill_before=late // 2)["killed_by"] == signal.SIGKILL
    assert zygote.walk(killed, kill_before=late // 2)["killed_by"] == signal.SIGKILL
    continued = zygote.walk(killed)
    assert continued["scores"] == whole["scores"]
    assert continued["continued"] and continued["bytes_read"] < whole["bytes_read"]


def test_a_finished_walk_is_not_walked_again(zygote: Zygote, tmp_path: Path) -> None:
    first, second = zygote.walk(tmp_path), zygote.walk(tmp_path)
    assert second["scores"] == first["scores"] and second["kl_div"] == first["kl_div"]
    assert second["bytes_read"] == 0 < first["bytes_read"]


def test_any_number_of_ranks_gives_the_same_scores(zygote: Zygote, tmp_path: Path) -> None:
    (alone,) = zygote.walk(tmp_path / "1", ranks=1, micro_batch_tokens=8)
    for ranks in (2, 3):
        first, *others = zygote.walk(tmp_path / str(ranks), ranks=ranks, micro_batch_tokens=8)
        assert first["scores"] == alone["scores"] and first["kl_div"] == alone["kl_div"]
        assert first["operations"] < alone["operations"], "rank 0 writes its own rows alone"
        assert others == [{"killed_by": None}] * (ranks - 1)


def test_a_killed_rank_ends_the_others_and_one_process_goes_on(zygote: Zygote, tmp_path: Path) -> None:
    answers = zygote.walk(tmp_path / "killed", ranks=2, micro_batch_tokens=8, kill_rank=1, kill_before=12)
    assert answers[0]["error"] == "RankLostError" and answers[1] == {"killed_by": signal.SIGKILL}
    (continued,) = zygote.walk(tmp_path / "killed", ranks=1, micro_batch_tokens=8)
    (whole,) = zygote.walk(tmp_path / "whole", ranks=1, micro_batch_tokens=8)
    assert continued["continued"] and continued["scores"] == whole["scores"]


def test_what_rank_0_cannot_use_ends_the_others(zygote: Zygote, tmp_path: Path) -> None:
    zygote.walk(tmp_path, ranks=1, micro_batch_tokens=8)
    answers = zygote.walk(tmp_path, ranks=2, micro_batch_tokens=9)
    assert [answer["error"] for answer in answers] == ["InputError", "TogetherError"]
    assert answers[0]["message"] == answers[1]["message"]


def engine(models: tuple[Path, Path], folder: Path, **changes: Any) -> WalkEngine:
    options: dict[str, Any] = {"micro_batch_tokens": 64} | changes
    return WalkEngine(WalkSettings(*models, folder, "float32", "cpu", **options))


REQUESTS = [score_request([4, 5, 6], [token], 64) for token in (7, 8)]


def test_another_request_or_setting_is_refused_by_name(models: tuple[Path, Path], tmp_path: Path) -> None:
    engine(models, tmp_path).score(REQUESTS)
    with pytest.raises(InputError, match=r"begun with other requests .*--restart starts over"):
        engine(models, tmp_path).score(REQUESTS[:1])
    with pytest.raises(InputError, match="begun with micro_batch_tokens = 64, now it is 65"):
        engine(models, tmp_path, micro_batch_tokens=65).score(REQUESTS)
    with pytest.raises(InputError, match="begun with another quantized checkpoint"):
        WalkEngine(WalkSettings(models[0], None, tmp_path, "float32", "cpu")).score(REQUESTS)
    assert engine(models, tmp_path, micro_batch_tokens=None).score(REQUESTS)
    fresh = engine(models, tmp_path, restart=True)
    fresh.score(REQUESTS[:1])
    assert fresh.outcome is not None and not fresh.outcome.continued


def stopped_before_the_head(models: tuple[Path, Path], folder: Path) -> Path:
    """A walk whose head was stopped; the hidden states that it would have read."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ScoringJob, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        engine(models, folder).score(REQUESTS)
    return folder / "walk" / "hidden-00003.bin"


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_hidden_states_that_changed_are_refused(models: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    hidden = stopped_before_the_head(models, tmp_path)
    content = bytearray(hidden.read_bytes())
    if damage == "flip":
        content[100] ^= 1
        hidden.write_bytes(content)
    elif damage == "cut":
        hidden.write_bytes(content[:-4])
    else:
        hidden.unlink()
    with pytest.raises(InputError, match=r"hidden-00003\.bin .* start over with --restart"):
        engine(models, tmp_path).score(REQUESTS)
    assert engine(models, tmp_path, restart=True).score(REQUESTS)


def test_damaged_answers_and_manifest_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    engine(models, tmp_path).score(REQUESTS)
    answers, manifest = tmp_path / "walk" / "answers.npz", tmp_path / "walk" / "job.json"
    answers.write_bytes(answers.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"answers\.npz is gone or not what was written"):
        engine(models, tmp_path).score(REQUESTS)
    manifest.write_text("{")
    with pytest.raises(InputError, match=r"job\.json is damaged"):
        engine(models, tmp_path).score(REQUESTS)


def test_two_processes_cannot_walk_in_one_folder(models: tuple[Path, Path], tmp_path: Path) -> None:
    with ScoringJob(tmp_path / "walk", {}).open(), pytest.raises(InputError, match="in use by another evaluation"):
        engine(models, tmp_path).score(REQUESTS)
