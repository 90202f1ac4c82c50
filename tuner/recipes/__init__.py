"""Named tasks — model, calibration data and `eval_func` — and the table of the built-in ones."""

from tuner.errors import UnknownNameError
from tuner.recipes import (
    arrays,
    char_lm,
    digits_depthwise,
    digits_resnet,
    digits_vit_outliers,
    minilm,
)
from tuner.recipes.base import Parameters, Recipe, Task, TrainingParameters

__all__ = ["RECIPES", "Parameters", "Recipe", "Task", "TrainingParameters", "get", "names"]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        digits_resnet.RECIPE,
        digits_depthwise.RECIPE,
        digits_vit_outliers.RECIPE,
        char_lm.RECIPE,
        minilm.RECIPE,
        arrays.RECIPE,
    )
}


def get(name: str) -> Recipe:
    """Return the recipe of this name; an unknown name is an error that lists the near ones."""
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    return RECIPES[name]


def names() -> tuple[str, ...]:
    """Return the names of all recipes."""
    return tuple(RECIPES)
