"""The recipes that jobs can name: built in, installed as entry points, or files of a folder."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server import strict_json
from server.errors import InvalidError
from server.problems import field_errors
from tuner.errors import UnknownNameError
from tuner.recipes import RECIPES, Parameters, Recipe

_GROUP = "tuner.recipes"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broken:
    """A place that should give recipes, but does not; `error` says why."""

    source: str
    error: str


class Catalog:
    """All recipes by name. What cannot be loaded is listed in `broken`, and the rest is usable."""

    def __init__(self, recipes: Mapping[str, Recipe], broken: Iterable[Broken] = ()) -> None:
        self._recipes = dict(sorted(recipes.items()))
        self._schemas = {name: _schema(recipe) for name, recipe in recipes.items()}
        self.broken = tuple(broken)

    @classmethod
    def load(cls, folder: Path | None = None) -> "Catalog":
        """Find the recipes of this machine; `folder` holds files with `RECIPE` or `RECIPES`."""
        recipes, broken = dict(RECIPES), []
        for source, read in _sources(folder):
            try:
                found = read()
                _check_usable(found, recipes)
            # The operator's code runs here, and may do anything: it must not end the service.
            except (Exception, SystemExit) as error:
                _log.error("recipes of %s cannot be used", source, exc_info=error)
                broken.append(Broken(source, f"{type(error).__name__}: {error}"))
            else:
                recipes |= {recipe.name: recipe for recipe in found}
        return cls(recipes, broken)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """All recipes, by name."""
        return tuple(self._recipes.values())

    def get(self, name: str) -> Recipe:
        """Return a recipe; an unknown name is an UnknownNameError that lists the near ones."""
        if name not in self._recipes:
            raise UnknownNameError("recipe", name, self._recipes)
        return self._recipes[name]

    def schema(self, name: str) -> dict[str, Any]:
        """Return the JSON schema of a recipe's parameters."""
        self.get(name)
        return self._schemas[name]

    def checked(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters as the recipe's own model reads them, without its defaults.

        Raises InvalidError, with a pointer for every parameter that is wrong.
        """
        try:
            recipe = self.get(name)
        except UnknownNameError as error:
            place = {"detail": str(error), "pointer": "/recipe"}
            raise InvalidError(str(error), errors=[place]) from error
        return _checked(recipe, params)


def _schema(recipe: Recipe) -> dict[str, Any]:
    return recipe.parameters.model_json_schema()


def _checked(recipe: Recipe, params: Mapping[str, Any]) -> dict[str, Any]:
    try:
        given: Parameters = recipe.parameters.model_validate(dict(params))
    except ValidationError as error:
        errors = field_errors(error.errors(include_url=False), params, "/params")
        raise InvalidError(
            f"{len(errors)} parameters do not fit the recipe {recipe.name!r}: `errors` lists them",
            errors=errors,
        ) from error
    dumped = given.model_dump(mode="json", exclude_unset=True)
    try:
        strict_json.check(dumped)
    except ValueError as error:
        place = {"detail": str(error), "pointer": "/params"}
        raise InvalidError(f"the parameters cannot be stored: {error}", errors=[place]) from error
    return dumped


def _sources(folder: Path | None) -> Iterator[tuple[str, Callable[[], list[Recipe]]]]:
    for point in sorted(entry_points(group=_GROUP), key=lambda point: (point.name, point.value)):
        yield f"entry point {point.name} = {point.value}", partial(_from_entry_point, point)
    if folder is None:
        return
    if not folder.is_dir():
        yield str(folder), partial(_no_folder, folder)
        return
    for file in sorted(folder.glob("*.py")):
        yield str(file), partial(_from_file, file)


def _from_entry_point(point: EntryPoint) -> list[Recipe]:
    return _listed(point.load())


def _no_folder(folder: Path) -> list[Recipe]:
    raise FileNotFoundError(f"the folder of recipes {str(folder)!r} does not exist")


def _from_file(file: Path) -> list[Recipe]:
    name = f"accutune_recipes_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pydantic looks up the names in annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if not (hasattr(module, "RECIPE") or hasattr(module, "RECIPES")):
        raise AttributeError("the file defines neither RECIPE nor RECIPES")
    single = [module.RECIPE] if hasattr(module, "RECIPE") else []
    return _listed([*single, *_listed(getattr(module, "RECIPES", []))])


def _listed(found: Any) -> list[Recipe]:
    """Return the recipes of one recipe, a mapping of them by name, or an iterable."""
    if isinstance(found, Recipe):
        return [found]
    recipes = list(found.values() if isinstance(found, Mapping) else found)
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"{recipe!r} is no tuner.recipes.Recipe")
    return recipes


def _check_usable(found: Iterable[Recipe], known: Mapping[str, Recipe]) -> None:
    seen: set[str] = set()
    for recipe in found:
        if recipe.name in known or recipe.name in seen:
            raise ValueError(
                f"there is another recipe of the name {recipe.name!r}: give this one another name"
            )
        _schema(recipe)
        seen.add(recipe.name)
