"""The scripts in runs/ say what the command line understands."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from fourge.cli import app

RUNS = Path(__file__).resolve().parents[1] / "runs"


def printed(script: str, **environment: str) -> list[list[str]]:
    """The commands of a dry run, as words."""
    environment |= {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([RUNS / script, "--print"], env=environment, check=True, capture_output=True, text=True)
    return [shlex.split(line.removeprefix("+ ")) for line in done.stdout.splitlines()]


def our_arguments(commands: list[list[str]]) -> Iterator[list[str]]:
    """What follows `fourge` in each command that has it."""
    for words in commands:
        for place, word in enumerate(words):
            if Path(word).name == "fourge":
                yield words[place + 1 :]
                break


def require_understood(arguments: list[str]) -> None:
    """Fails where click would refuse the verb, an option or a value."""
    verb = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    verb.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("gpus", ["1", "8"])
def test_the_headline_uses_commands_that_exist(gpus: str) -> None:
    commands = list(our_arguments(printed("hermes4_405b.sh", GPUS=gpus)))
    assert [words[0] for words in commands] == ["plan", "quantize", "verify", "evaluate", "evaluate", "card", "page"]
    for words in commands:
        require_understood(words)


@pytest.mark.parametrize("script", ["hermes4_405b.sh", "ranks.sbatch"])
def test_the_shell_can_read_them(script: str) -> None:
    subprocess.run(["bash", "-n", RUNS / script], check=True)


def test_the_slurm_job_starts_ranks_of_quantize() -> None:
    text = (RUNS / "ranks.sbatch").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^srun .*$", text, re.MULTILINE)
    words = shlex.split(re.sub(r"\$\(\(.*?\)\)", "8", command).replace('"$@"', ""))
    assert "--nnodes" in words and "--nproc-per-node" in words
    (arguments,) = our_arguments([words])
    require_understood(arguments)


def test_the_kubernetes_job_starts_ranks_of_quantize() -> None:
    service, job = yaml.safe_load_all((RUNS / "ranks.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert f"--nnodes={job['spec']['completions']}" in container["command"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    meeting = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr={meeting}" in container["command"] and pod["subdomain"] == service["metadata"]["name"]
    (arguments,) = our_arguments([container["command"]])
    require_understood(arguments)
