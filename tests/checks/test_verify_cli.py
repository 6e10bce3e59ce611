"""`fourge verify` as scripts and people see it: exit codes, JSON on standard output, one line for what is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fourge.cli import app


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_json_of_a_good_checkpoint(quantized: Callable) -> None:
    source, output = quantized()
    code, out, err = run(output, "--source", source, "--deep", "--json", "--threads", "1")
    report = json.loads(out)
    assert code == 0
    assert report["passed"] is True
    assert report["output"] == str(output)
    assert {check["status"] for check in report["checks"]} == {"passed"}
    assert set(report["checks"][0]) == {"name", "status", "detail", "failures"}
    assert report["fidelity"]["kl_div"]["tokens"] == 30
    assert [error["layer"] for error in report["hidden_errors"]] == [0, 1]
    assert "layer 1" in err, "progress goes to standard error"


def test_json_of_a_damaged_checkpoint(copy: Callable) -> None:
    damaged = copy()
    (damaged.directory / "LICENSE").unlink()
    code, out, _ = run(damaged.directory, "--source", damaged.source, "--json")
    report = json.loads(out)
    assert code == 1
    assert report["passed"] is False
    assert [check["failures"] for check in report["checks"] if check["status"] == "failed"] == [["LICENSE is missing"]]


def test_the_table_for_people(copy: Callable) -> None:
    damaged = copy()
    (damaged.directory / "LICENSE").unlink()
    code, out, _ = run(damaged.directory, "--source", damaged.source)
    assert code == 1
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["FAILED", "sidecars         5 files beside the weights"] in lines
    assert ["-", "LICENSE is missing"] in lines
    assert lines[-1] == ["10", "passed, 1 failed, 2 skipped"]


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--deep"]])
def test_exit_code_2_in_a_process_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fourge", "verify", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fourge: ") and done.stderr.count("\n") == 1
