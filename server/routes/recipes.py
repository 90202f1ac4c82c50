"""The recipes that jobs can name."""

from typing import Annotated

from fastapi import APIRouter, Path

from server.catalog import Catalog
from server.errors import NotFoundError
from server.problems import declared
from server.routes.common import Reader, UsesServices
from server.schemas import BrokenRecipe, RecipeInfo, Recipes
from tuner.errors import UnknownNameError
from tuner.recipes import Recipe

router = APIRouter(prefix="/v1/recipes", tags=["recipes"])

_Name = Annotated[str, Path(min_length=1, max_length=255, examples=["digits-resnet"])]


@router.get("", operation_id="list_recipes", summary="List recipes")
def list_recipes(services: UsesServices, caller: Reader) -> Recipes:
    """Return all recipes with the JSON schemas of their parameters, and what is broken."""
    catalog = services.catalog
    broken = [BrokenRecipe(source=one.source, error=one.error) for one in catalog.broken]
    items = [_info(catalog, recipe) for recipe in catalog.recipes]
    return Recipes(items=items, next_cursor=None, broken=broken)


@router.get("/{name}", operation_id="get_recipe", summary="Read a recipe", responses=declared(404))
def get_recipe(name: _Name, services: UsesServices, caller: Reader) -> RecipeInfo:
    """Return one recipe with the JSON schema of its parameters."""
    try:
        return _info(services.catalog, services.catalog.get(name))
    except UnknownNameError as error:
        raise NotFoundError(str(error)) from error


def _info(catalog: Catalog, recipe: Recipe) -> RecipeInfo:
    return RecipeInfo(
        name=recipe.name, summary=recipe.summary, parameters=catalog.schema(recipe.name)
    )
