"""Where commands take model, data and eval_func from: the user's function, or a recipe."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from tuner import recipes
from tuner.errors import TunerError


def _function(target: str) -> Callable[[], Any]:
    name, _, function = target.partition(":")
    if not function or not all(name.split(".")):
        raise TunerError(
            f"{target!r} names no function: give MODULE:FUNCTION, such as mymodel:task"
        )
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, but one that it imports is not
        raise TunerError(f"there is no module {name!r} here or on the path") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = sorted(n for n, value in vars(module).items() if inspect.isfunction(value))
        raise TunerError(f"{name!r} has no function {function!r}; it has {', '.join(names)}")
    return found  # type: ignore[no-any-return]


def _parts(value: Any) -> tuple[Any, Any, Any]:
    if not isinstance(value, tuple) or len(value) != 3:
        raise TunerError(
            f"the function returned a {type(value).__name__}: it must return the tuple "
            "(model, calib_dataloader, eval_func)"
        )
    return value


def task_of(target: str | None, recipe: str, out: Console) -> tuple[Any, Any, Any]:
    """Return model, data and eval_func of the user's function, or of a recipe."""
    if target is not None:
        return parts_of(target)
    out.print(f"[bold]Recipe {recipe}[/]: training, or loading the weights of the last time …")
    task = recipes.get(recipe).task()
    out.print(task.description)
    return task.model, task.calib_dataloader, task.eval_func


def parts_of(target: str) -> tuple[Any, Any, Any]:
    """Return what MODULE:FUNCTION gives: model, calib_dataloader, eval_func."""
    return _parts(_function(target)())
