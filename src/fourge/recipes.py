"""How much care a quantization takes: the methods that go together, by name, and the one that is taken by default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class Recipe:
    """What a recipe stands for, in the options' own names."""

    method: str
    smooth: bool


RECIPES: Mapping[RecipeName, Recipe] = {
    "fast": Recipe("search", smooth=False),
    "balanced": Recipe("search", smooth=True),
    "best": Recipe("tuned", smooth=True),
}
"""From figures on held-out text (`docs/methods.md`). Only `best` needs a Hessian, and two matrices of its size beside
it; the others run wherever a layer fits."""

DEFAULT: RecipeName = "best"

WITHOUT_DATA = Recipe("search", smooth=False)


def resolve(recipe: RecipeName | None, method: str | None, smooth: bool | None, *, has_data: bool) -> Recipe:
    """The method and whether to smooth, from what was asked for and what was left out (None).

    A method named alone is that method and nothing else: `--method max` is the published card's recipe. Without
    calibration data a recipe goes as far as weights alone allow: searched scales, for all else looks at activations.
    """
    if recipe is None and method is not None:
        return Recipe(method, bool(smooth))
    chosen = RECIPES[recipe or DEFAULT] if has_data else WITHOUT_DATA
    return Recipe(method or chosen.method, chosen.smooth if smooth is None else smooth)
