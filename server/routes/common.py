"""What routes share: the services, the callers, and the parameters that come again and again."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Query, Request
from starlette.convertors import StringConvertor, register_url_convertor

from server.auth import Caller, Scope, require
from server.errors import ForbiddenError, MediaTypeError
from server.services import Services

Item = TypeVar("Item")


class _IdConvertor(StringConvertor):
    """A part of a path that ends before a colon, so that `{job_id:id}:cancel` is a path."""

    regex = "[^/:]+"


register_url_convertor("id", _IdConvertor())


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def expect_json(request: Request) -> None:
    """Raise MediaTypeError for a body that does not say that it is JSON."""
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(
            f"the body is {media_type or 'of no type'!r}: send JSON, and "
            "'Content-Type: application/json'"
        )


UsesServices = Annotated[Services, Depends(_services)]
Reader = Annotated[Caller, Depends(require(Scope.READ))]
Submitter = Annotated[Caller, Depends(require(Scope.SUBMIT))]

JOB_ID = r"^[0-9a-hjkmnp-tv-z]{26}$"
JobId = Annotated[
    str,
    Path(description="The job's id.", pattern=JOB_ID, examples=["01k9yv6mzj8x7w3c5r2q4t0abd"]),
]
Cursor = Annotated[
    str | None,
    Query(
        description="`next_cursor` of the page before; none for the first page.",
        pattern=r"^[A-Za-z0-9_-]+$",
        max_length=200,
    ),
]


def cut(found: Sequence[Item], limit: int) -> tuple[list[Item], Item | None]:
    """Return the page of a list that was read one item too far, and its last item if more come."""
    items = list(found[:limit])
    return items, items[-1] if len(found) > limit else None


def check_owner(caller: Caller, owner: str) -> None:
    """Raise ForbiddenError unless the job is the caller's own, or the caller is an admin."""
    if caller.owner != owner and not caller.may(Scope.ADMIN):
        raise ForbiddenError(f"this job belongs to {owner!r}: only its owner or an admin may do so")
