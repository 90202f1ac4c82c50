"""The workers, and which jobs they hold."""

from typing import Annotated

from fastapi import APIRouter, Query

from server import cursors, workers
from server.routes.common import Cursor, Reader, UsesServices, cut
from server.schemas import Page, WorkerInfo

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("", operation_id="list_workers", summary="List workers")
def list_workers(
    services: UsesServices,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Cursor = None,
) -> Page[WorkerInfo]:
    """Return the workers, those that started last first; `lost` ones no longer report."""
    before = None if cursor is None else cursors.decode("workers", cursor)
    found = workers.listed(services.database, services.settings.lease_s, limit + 1, before)
    items, last = cut(found, limit)
    following = None if last is None else cursors.encode("workers", last.id)
    return Page[WorkerInfo](items=items, next_cursor=following)
