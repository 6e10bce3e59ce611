"""The shape of the house: what imports what, and what `import fourge` costs."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fourge

PACKAGE = Path(fourge.__file__).parent
MAY_IMPORT = {
    "nvfp4": set(),
    "checkpoint": {"nvfp4", "settings", "errors"},
    "settings": set(),
    "launch": {"errors"},
    "recipes": set(),
    "recipe_file": {"checkpoint", "settings", "methods", "errors"},
    "mixing": {"nvfp4", "checkpoint", "methods", "settings", "progress", "errors", "walk"},
    "sensitivity": {"checkpoint", "mixing", "recipe_file", "settings", "progress", "errors", "walk"},
    "data": {"checkpoint", "errors"},
    "methods": {"nvfp4", "errors"},
    "progress": set(),
    "walk": {"nvfp4", "checkpoint", "methods", "data", "settings", "launch", "progress", "errors", "_version"},
    "checks": {"nvfp4", "checkpoint", "methods", "data", "settings", "progress", "errors", "walk"},
    "quantize": {"checkpoint", "data", "recipes", "recipe_file", "settings", "progress", "errors", "walk", "_version"},
    "verify": {"checkpoint", "checks", "data", "settings", "progress", "errors", "walk"},
    "convert": {"checkpoint", "checks", "settings", "progress", "errors", "_version"},
    "planning": {"nvfp4", "checkpoint", "methods", "settings", "progress", "errors", "walk", "checks"},
    "evaluate": {"checkpoint", "checks", "evaluation", "settings", "progress", "errors", "walk", "_version"},
    "plan": {"planning", "recipes", "recipe_file", "settings", "errors", "walk"},
    "evaluation": {
        *("nvfp4", "checkpoint", "settings", "data", "progress", "errors", "walk", "checks", "methods", "planning"),
        *("serving", "_version"),
    },
    "compare": {"checkpoint", "evaluation", "progress", "errors"},
    "serving": {"nvfp4", "checkpoint", "planning", "settings", "errors", "progress", "walk", "data", "checks"},
    "chatting": {"checkpoint", "planning", "progress", "errors", "serving", "walk"},
    "chat": {"chatting", "errors", "serving", "walk"},
    "serve": {"plan", "planning", "serving", "settings", "errors", "walk"},
    "publishing": {
        *("nvfp4", "checkpoint", "settings", "data", "progress", "errors", "walk", "checks", "planning", "plan"),
        *("report", "evaluation", "_version"),
    },
    "card": {"publishing", "sbom", "errors"},
    "push": {"checkpoint", "publishing", "verify", "errors"},
    "sign": {"checkpoint", "publishing", "sbom", "progress", "errors"},
    "sbom": {"checkpoint", "publishing", "errors"},
    "page": {"checkpoint", "publishing", "errors"},
    "report": {"plan", "planning", "quantize", "sensitivity", "verify", "convert", "progress", "checks"},
    "cli": {
        *("card", "page", "push", "sign", "sbom", "chat", "compare", "serve"),
        *("evaluate", "plan", "quantize", "sensitivity", "verify", "convert", "report"),
        *("errors", "launch", "_version"),
    },
}
"""Which rooms (and single files) of the package a room may know."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of our package that a file imports anywhere, but for type checking alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    rooms = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fourge."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fourge.")}
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__", "_version", "errors"):
        return
    assert imported_rooms(path) - {room} <= MAY_IMPORT[room]


def test_import_fourge_is_light() -> None:
    heavy = ["torch", "transformers", "compressed_tensors", "datasets", "lm_eval", "vllm", "numpy"]
    code = f"import sys, fourge; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_names_every_file() -> None:
    tree = (PACKAGE.parents[1] / "README.md").read_text().partition("## Files")[2]
    names = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    files = {path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert files <= names


def test_the_command_says_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "fourge", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"fourge {version('fourge')}\n"
