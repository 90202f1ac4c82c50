"""What happens to a job, as it happens: server-sent events, or a page of those stored."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, get_args

import anyio
from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from server import cursors, views
from server.auth import Caller
from server.db.models import EventRow
from server.problems import declared
from server.routes.common import Cursor, JobId, Reader, UsesServices, cut
from server.schemas import Event, EventKind, Page
from server.services import Services
from server.states import ENDED

router = APIRouter(prefix="/v1/jobs/{job_id:id}", tags=["events"])

HEARTBEAT_S = 15.0
_RETRY_MS = 2000
_BATCH = 500
_STREAM = "text/event-stream"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold them back
_ITEM = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string", "enum": list(get_args(EventKind))},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_EventId = Annotated[int | None, Query(ge=0, le=2**63 - 1)]
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {_STREAM: {"itemSchema": _ITEM}}},
    204: {"description": "The job has ended, and no events follow: do not come again."},
    **declared(404),
}


@router.get(
    "/events",
    operation_id="list_events",
    summary="Follow a job's events",
    response_model=Page[Event],
    responses=_RESPONSES,
)
async def list_events(
    job_id: JobId,
    services: UsesServices,
    caller: Reader,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[
        int | None, Header(ge=0, le=2**63 - 1, description="Goes before `after`.")
    ] = None,
    after: Annotated[_EventId, Query(description="Only events with larger ids.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of a page.")] = 100,
    cursor: Cursor = None,
) -> Any:
    """Stream the events of a job until it has ended; `Accept: application/json` gives a page.

    The `id` of an event can be given back, so that a stream goes on where it broke off.
    """
    begin = last_event_id if last_event_id is not None else after or 0
    if "application/json" in accept and _STREAM not in accept:
        if cursor is not None:
            begin = cursors.decode_number("events", cursor, 2**63 - 1)
        return await run_in_threadpool(_page, services, job_id, begin, limit)
    job = await run_in_threadpool(services.jobs.get, job_id)
    first = await run_in_threadpool(services.jobs.events, job_id, begin, _BATCH)
    if not first and job.state in ENDED:
        return Response(status_code=204)
    return StreamingResponse(
        _stream(services, caller, job_id, begin, first), headers=_HEADERS, media_type=_STREAM
    )


def _page(services: Services, job_id: str, begin: int, limit: int) -> Page[Event]:
    rows, last = cut(services.jobs.events(job_id, begin, limit + 1), limit)
    following = None if last is None else cursors.encode("events", last.id)
    return Page[Event](items=[views.event(row) for row in rows], next_cursor=following)


async def _stream(
    services: Services, caller: Caller, job_id: str, after: int, events: list[EventRow]
) -> AsyncIterator[bytes]:
    """Yield the events that follow, and comments where nothing happens for long.

    It ends with the caller's token, too.
    """
    yield format_sse_event(retry=_RETRY_MS)
    with services.hub.watch(job_id) as watch:
        while not watch.is_closed:
            for event in events:
                yield _encoded(event)
                after = event.id
            if events and _is_end(events[-1]):
                return
            if not events:
                with anyio.move_on_after(HEARTBEAT_S) as waited:
                    await watch.newer_than(after)
                if waited.cancelled_caught:
                    if not await run_in_threadpool(_may_listen, services, caller):
                        return
                    yield KEEPALIVE_COMMENT
                    continue
            events = await run_in_threadpool(services.jobs.events, job_id, after, _BATCH)
            # asked last: no event that came after the token was revoked is sent
            if not await run_in_threadpool(_may_listen, services, caller):
                return


def _may_listen(services: Services, caller: Caller) -> bool:
    return caller.token_id is None or services.tokens.of_id(caller.token_id) is not None


def _encoded(event: EventRow) -> bytes:
    return format_sse_event(id=str(event.id), event=event.kind, data_str=json.dumps(event.data))


def _is_end(event: EventRow) -> bool:
    return event.kind == "state" and event.data["state"] in ENDED
