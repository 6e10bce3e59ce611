"""What a run says while it goes on."""

import io
import json
from pathlib import Path

import pytest

import fourge.progress
from fourge.progress import WalkProgress, format_binary, format_bytes, format_seconds


def test_seconds_and_bytes_for_people() -> None:
    seconds = [format_seconds(s) for s in (0.4, 59, 61, 3599, 3600, 7_384)]
    assert seconds == ["0s", "59s", "1m01s", "59m59s", "1h00m", "2h03m"]
    assert [format_bytes(b) for b in (999, 1000, 811.7e9, 2.5e12)] == ["999 B", "1.0 kB", "811.7 GB", "2.50 TB"]
    assert [format_binary(b) for b in (0, 97.4 * 2**20, 2**30, 218.2 * 2**30)] == [
        *("0.0 MiB", "97.4 MiB", "1.0 GiB", "218.2 GiB"),
    ]


def test_eta_follows_the_cost_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(fourge.progress.time, "monotonic", lambda: now[0])
    progress = WalkProgress("walk", 4, done=1, stream=io.StringIO(), costs=[0.0, 1.0, 1.0, 2.0])
    assert progress.eta_seconds is None
    now[0] = 110.0
    progress.finish_step("layer 0", "", {})
    assert progress.eta_seconds == pytest.approx(30.0)
    now[0] = 115.0
    progress.advance(0.5)
    assert progress.eta_seconds == pytest.approx(15.0 / 1.5 * 2.5)


def test_plain_lines_and_a_log_when_not_on_a_terminal(tmp_path: Path) -> None:
    stream, log = io.StringIO(), tmp_path / "metrics.jsonl"
    with WalkProgress("walk", 2, log=log, stream=stream, about={"machine": "this"}) as progress:
        progress.advance(1.0, tokens=7, read=1000)
        progress.finish_step("embedding", "", {"step": 0})
        progress.finish_step("layer 0", "error 0.1", {"step": 1})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "1/2" in lines[0] and "error 0.1" in lines[1] and "ETA" in lines[0] and "RSS" in lines[0]
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert (first["name"], first["tokens"], first["bytes_read"]) == ("embedding", 7, 1000)
    assert (second["step"], second["tokens"]) == (1, 0) and second["resident_bytes"] > 0
    assert second["peak_resident_bytes"] >= first["peak_resident_bytes"] > 0
    assert first["cpu_seconds"] >= 0 and second["cpu_seconds"] >= 0
    assert first["machine"] == second["machine"] == "this"
