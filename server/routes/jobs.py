"""Jobs: submitted, listed, read, paused, resumed and cancelled."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response

from server import asset_parameters, cursors, etags, views
from server.auth import Caller
from server.problems import declared
from server.routes.common import (
    Cursor,
    JobId,
    Reader,
    Submitter,
    UsesServices,
    check_owner,
    cut,
    expect_json,
)
from server.schemas import Job, Name, Page, Submission
from server.services import Services
from server.states import Move, State

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_KEY = Header(
    description="A name of your own for this submission: sent again with the same body it gives "
    "the same job, so that it is safe to retry.",
    min_length=1,
    max_length=255,
    pattern=r"^[\x21-\x7e]+$",
)
_LABEL = Query(
    description="`name:value` of a label.",
    pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}:[^\x00]{0,255}$",
    examples=["team:vision"],
)
_LOCATION = {"Location": {"description": "Where the job is.", "schema": {"type": "string"}}}
_ETAG = {"ETag": {"description": "Changes with the job.", "schema": {"type": "string"}}}
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The job is still what If-None-Match names.", "headers": _ETAG}
}


@router.post(
    "",
    operation_id="submit_job",
    summary="Submit a job",
    status_code=202,
    responses={202: {"headers": _LOCATION}, **declared(413, 415)},
    dependencies=[Depends(expect_json)],
)
def submit_job(
    submission: Submission,
    response: Response,
    services: UsesServices,
    caller: Submitter,
    idempotency_key: Annotated[str | None, _KEY] = None,
) -> Job:
    """Queue a job: a recipe, its parameters, and what the search is to do."""
    params = services.catalog.checked(submission.recipe, submission.params)
    schema = services.catalog.schema(submission.recipe)
    asset_parameters.check(services.assets, schema, params, caller.owner)
    row, _ = services.jobs.submit(
        submission.model_copy(update={"params": params}),
        caller.owner,
        idempotency_key,
        services.settings.max_queued_jobs,
    )
    job = views.job(row)
    response.headers["Location"] = job.links.self
    return job


@router.get("", operation_id="list_jobs", summary="List jobs")
def list_jobs(
    services: UsesServices,
    caller: Reader,
    state: Annotated[list[State], Query(description="Any of these.")] = [],  # noqa: B006
    recipe: Annotated[Name | None, Query()] = None,
    owner: Annotated[Name | None, Query()] = None,
    label: Annotated[str | None, _LABEL] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Cursor = None,
) -> Page[Job]:
    """Return jobs, the newest first; what is given must all hold."""
    name, _, value = (label or "").partition(":")
    found = services.jobs.page(
        limit + 1,
        before=None if cursor is None else cursors.decode("jobs", cursor),
        owner=owner,
        states=state,
        recipe=recipe,
        label=None if label is None else (name, value),
    )
    rows, last = cut(found, limit)
    following = None if last is None else cursors.encode("jobs", last.id)
    return Page[Job](items=[views.job(row) for row in rows], next_cursor=following)


@router.get(
    "/{job_id:id}",
    operation_id="get_job",
    summary="Read a job",
    response_model=Job,
    responses={200: {"headers": _ETAG}, **_NOT_MODIFIED, **declared(404)},
)
def get_job(
    job_id: JobId,
    response: Response,
    services: UsesServices,
    caller: Reader,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Any:
    """Return a job; with If-None-Match only if it has changed."""
    row = services.jobs.get(job_id)
    tag = etags.strong(row.version)
    if etags.is_among(tag, if_none_match):
        return Response(status_code=304, headers={"ETag": tag})
    response.headers["ETag"] = tag
    return views.job(row)


@router.post(
    "/{job_id:id}:cancel",
    operation_id="cancel_job",
    summary="Cancel a job",
    status_code=202,
    responses=declared(404, 409),
)
def cancel_job(job_id: JobId, services: UsesServices, caller: Submitter) -> Job:
    """End a job for good, within one batch of the evaluation that runs."""
    return _asked(services, caller, job_id, Move.CANCEL)


@router.post(
    "/{job_id:id}:pause",
    operation_id="pause_job",
    summary="Pause a job",
    status_code=202,
    responses=declared(404, 409),
)
def pause_job(job_id: JobId, services: UsesServices, caller: Submitter) -> Job:
    """Let the running trial end, then free the worker."""
    return _asked(services, caller, job_id, Move.PAUSE)


@router.post(
    "/{job_id:id}:resume",
    operation_id="resume_job",
    summary="Resume a job",
    status_code=202,
    responses=declared(404, 409),
)
def resume_job(job_id: JobId, services: UsesServices, caller: Submitter) -> Job:
    """Go on with a paused job, from its stored trials."""
    return _asked(services, caller, job_id, Move.RESUME)


def _asked(services: Services, caller: Caller, job_id: str, move: Move) -> Job:
    check_owner(caller, services.jobs.get(job_id).owner)
    return views.job(services.jobs.ask(job_id, move))
