"""What the pages' routes share."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.convertors import IntegerConvertor, register_url_convertor

from server.dashboard.pages import PageRoute

Before = Annotated[int | None, Query(ge=0, le=2**31 - 1)]
GivenId = Annotated[str, Query(max_length=26, pattern=r"^[^\x00]*$")]


class _NumberConvertor(IntegerConvertor):
    """A number that every database can hold."""

    regex = "[0-9]{1,9}"


register_url_convertor("number", _NumberConvertor())


def page_router(prefix: str = "") -> APIRouter:
    """Return a router whose errors are pages."""
    return APIRouter(prefix=prefix, route_class=PageRoute, include_in_schema=False)


async def _fields(request: Request) -> dict[str, str]:
    """Return the fields of a form; of those that come twice, the last."""
    form = await request.form()
    return {name: value for name, value in form.multi_items() if isinstance(value, str)}


Form = Annotated[dict[str, str], Depends(_fields)]
