"""What a job's search found: its trials, and the ops of its best plan."""

from typing import Annotated

from fastapi import APIRouter, Path, Query

from server import cursors
from server.problems import declared
from server.routes.common import Cursor, JobId, Reader, UsesServices, cut
from server.schemas import OpChoice, Page, Trial

router = APIRouter(prefix="/v1/jobs/{job_id:id}", tags=["trials"])

_Scores = Annotated[bool, Query(description="Add the scores of single samples, if there are any.")]
_Number = Annotated[
    int, Path(description="From 1 on; 0 is the FP32 baseline.", ge=0, le=2**31 - 1, examples=[1])
]


@router.get(
    "/trials",
    operation_id="list_trials",
    summary="List trials",
    response_model_exclude_unset=True,
    responses=declared(404),
)
def list_trials(
    job_id: JobId,
    services: UsesServices,
    caller: Reader,
    scores: _Scores = False,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Cursor = None,
) -> Page[Trial]:
    """Return the trials of a job by number, from 1 on."""
    job = services.jobs.get(job_id)
    after = 0 if cursor is None else cursors.decode_number("trials", cursor)
    records, last = cut(services.trials.page(job.study_name, limit + 1, after, scores), limit)
    following = None if last is None else cursors.encode("trials", last["number"])
    items = [Trial.model_validate(record) for record in records]
    return Page[Trial](items=items, next_cursor=following)


@router.get(
    "/trials/{number}",
    operation_id="get_trial",
    summary="Read a trial",
    response_model_exclude_unset=True,
    responses=declared(404),
)
def get_trial(
    job_id: JobId, number: _Number, services: UsesServices, caller: Reader, scores: _Scores = False
) -> Trial:
    """Return one trial with its plan; number 0 is the baseline."""
    job = services.jobs.get(job_id)
    return Trial.model_validate(services.trials.get(job.study_name, number, scores))


@router.get(
    "/ops", operation_id="list_ops", summary="List the best plan's ops", responses=declared(404)
)
def list_ops(
    job_id: JobId,
    services: UsesServices,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
    cursor: Cursor = None,
) -> Page[OpChoice]:
    """Return the op table of a succeeded job's best plan, in the order of the model."""
    after = -1 if cursor is None else cursors.decode_number("ops", cursor)
    rows, last = cut(services.trials.ops(job_id, limit + 1, after), limit)
    following = None if last is None else cursors.encode("ops", last[0])
    items = [OpChoice.model_validate(summary) for _, summary in rows]
    return Page[OpChoice](items=items, next_cursor=following)
