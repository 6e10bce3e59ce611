"""What a recipe stands for, and what is taken where nothing is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourge
from fourge.methods import METHODS
from fourge.recipes import RECIPES, Recipe, resolve

FEW: dict[str, Any] = {"num_calibration_samples": 4, "num_probe_samples": 1, "max_seq_length": 12, "threads": 1}


def settings_of(output: Path) -> tuple[str, bool]:
    settings = json.loads((output / ".fourge" / "job.json").read_text())["settings"]
    return settings["method"], settings["smooth"]


def test_recipes_name_methods_that_there_are() -> None:
    assert {recipe.method for recipe in RECIPES.values()} <= set(METHODS)


@pytest.mark.parametrize(
    ("asked", "has_data", "expected"),
    [
        ((None, None, None), True, Recipe("tuned", True)),
        ((None, None, None), False, Recipe("search", False)),
        ((None, None, False), True, Recipe("tuned", False)),
        ((None, "max", None), True, Recipe("max", False)),
        ((None, "max", True), True, Recipe("max", True)),
        (("fast", None, None), True, Recipe("search", False)),
        (("balanced", None, None), True, Recipe("search", True)),
        (("best", "gptq", None), True, Recipe("gptq", True)),
        (("best", None, None), False, Recipe("search", False)),
        # Asked for in so many words, smoothing without data is refused later, not dropped here.
        ((None, None, True), False, Recipe("search", True)),
    ],
)
def test_what_was_named_wins_over_the_recipe(asked: Any, has_data: bool, expected: Recipe) -> None:
    assert resolve(*asked, has_data=has_data) == expected


def test_the_default_in_a_job(pico: Callable[..., Path], tmp_path: Path) -> None:
    fourge.quantize(str(pico()), tmp_path / "w4a4", calibration="random", **FEW)
    assert settings_of(tmp_path / "w4a4") == ("tuned", True)
    fourge.quantize(str(pico()), tmp_path / "weights alone", scheme="NVFP4A16", threads=1)
    assert settings_of(tmp_path / "weights alone") == ("search", False)
