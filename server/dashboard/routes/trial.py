"""One trial of a job."""

from typing import Annotated

from fastapi import Path, Request, Response

from server.dashboard import searches
from server.dashboard.pages import render
from server.dashboard.routes.common import Before, page_router
from server.dashboard.trial_view import trial_page
from server.routes.common import JobId, Reader, UsesServices

router = page_router("/jobs/{job_id:id}")

Number = Annotated[int, Path(ge=0, le=2**31 - 1)]


@router.get("/trials/{number}")
def show_trial(
    request: Request,
    job_id: JobId,
    number: Number,
    services: UsesServices,
    caller: Reader,
    against: Before = None,
) -> Response:
    """Show a trial, and what it changed of another one's plan."""
    job = services.jobs.get(job_id)
    search = searches.of_job(services.database, job)
    table = searches.op_table(services.database, job_id)
    page = trial_page(services, job.study_name, search, number, against, table)
    return render(
        request, "trial.html", page=page, owner_name=job.recipe, owner_href=f"/jobs/{job_id}"
    )
