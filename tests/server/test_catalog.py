"""Recipes: found, refused where they are broken or clash, and their parameters checked."""

import logging
from pathlib import Path

import pytest

from server.catalog import Catalog
from server.errors import InvalidError
from tuner.errors import UnknownNameError
from tuner.recipes import RECIPES

_RECIPE = '''
from __future__ import annotations
from pydantic import Field
from tuner.recipes import Parameters, Recipe

class Mine(Parameters):
    """What can be chosen."""
    width: int = Field(default=4, ge=1)
    rate: float = 0.5
    text: str = ""

def build(parameters: Mine):
    raise NotImplementedError

{name} = {value}
'''
_ONE = 'Recipe("mine", "A recipe of one\'s own", Mine, build)'


def _write(folder: Path, file: str, name: str = "RECIPE", value: str = _ONE) -> None:
    (folder / file).write_text(_RECIPE.format(name=name, value=value))


def _names(catalog: Catalog) -> list[str]:
    return [recipe.name for recipe in catalog.recipes]


def test_the_built_in_recipes_are_there_by_name() -> None:
    assert _names(Catalog.load()) == sorted(RECIPES)
    assert Catalog.load().broken == ()


def test_files_of_the_folder_give_recipes(tmp_path: Path) -> None:
    _write(tmp_path, "one.py")
    several = '{"x": Recipe("x", "", Mine, build), "y": Recipe("y", "", Mine, build)}'
    _write(tmp_path, "several.py", "RECIPES", several)
    _write(tmp_path, "listed.py", "RECIPES", '[Recipe("z", "", Mine, build)]')
    (tmp_path / "notes.txt").write_text("no Python")
    catalog = Catalog.load(tmp_path)
    assert catalog.broken == ()
    assert _names(catalog) == sorted([*RECIPES, "mine", "x", "y", "z"])
    assert catalog.get("mine").summary == "A recipe of one's own"
    assert catalog.schema("mine")["properties"]["width"]["minimum"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module"),
        ("x = (", "SyntaxError"),
        ("x = 1", "AttributeError: the file defines neither RECIPE nor RECIPES"),
        ("RECIPE = 3", "TypeError"),
        ("RECIPES = ['x']", "TypeError: 'x' is no tuner.recipes.Recipe"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
        ("\0", "SyntaxError|ValueError"),
        (
            _RECIPE.format(name="RECIPE", value='Recipe("bad", "", int, build)'),
            "AttributeError",
        ),
    ],
)
def test_a_broken_file_is_listed_and_harms_no_other(
    text: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a_bad_one.py").write_text(text)
    _write(tmp_path, "good.py")
    with caplog.at_level(logging.ERROR):
        catalog = Catalog.load(tmp_path)
    assert _names(catalog) == sorted([*RECIPES, "mine"])
    (broken,) = catalog.broken
    assert broken.source == str(tmp_path / "a_bad_one.py")
    assert any(broken.error.startswith(one) for one in reason.split("|"))
    assert "a_bad_one.py cannot be used" in caplog.text


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "a.py")
    _write(tmp_path, "b.py")
    _write(tmp_path, "c.py", value='Recipe("char-lm", "", Mine, build)')
    _write(tmp_path, "d.py", "RECIPES", '[Recipe("d", "", Mine, build)] * 2')
    catalog = Catalog.load(tmp_path)
    assert _names(catalog) == sorted([*RECIPES, "mine"])
    assert catalog.get("char-lm") is RECIPES["char-lm"]
    errors = {Path(one.source).name: one.error for one in catalog.broken}
    assert errors.keys() == {"b.py", "c.py", "d.py"}
    assert "another recipe of the name 'char-lm'" in errors["c.py"]


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    (broken,) = Catalog.load(tmp_path / "none").broken
    assert "does not exist" in broken.error


def test_an_entry_point_gives_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = "[tuner.recipes]\nmine = theirs_recipes:RECIPE\ngone = theirs_recipes:NOTHING\n"
    (info / "entry_points.txt").write_text(points)
    _write(tmp_path, "theirs_recipes.py")
    monkeypatch.syspath_prepend(tmp_path)
    catalog = Catalog.load()
    assert "mine" in _names(catalog)
    (broken,) = catalog.broken
    assert broken.source == "entry point gone = theirs_recipes:NOTHING"


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="digits-resnet"):
        Catalog.load().get("digit-resnet")


def test_parameters_are_read_by_the_recipes_own_model(tmp_path: Path) -> None:
    _write(tmp_path, "one.py")
    catalog = Catalog.load(tmp_path)
    assert catalog.checked("mine", {}) == {}
    assert catalog.checked("mine", {"width": "8"}) == {"width": 8}
    for params, pointers in (
        ({"width": 0, "colour": 1}, ["/params/width", "/params/colour"]),
        ({"rate": float("inf")}, ["/params"]),
        ({"rate": float("nan")}, ["/params"]),
        ({"text": "\ud800"}, ["/params"]),
    ):
        with pytest.raises(InvalidError) as caught:
            catalog.checked("mine", params)
        assert [error["pointer"] for error in caught.value.details["errors"]] == pointers
