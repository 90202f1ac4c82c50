"""One job: its page, what changes on it, its report, and what can be asked of it."""

from collections.abc import Callable

from fastapi import Request, Response
from fastapi.responses import FileResponse

from server import artifacts
from server.dashboard.job_view import REPORT, job_page
from server.dashboard.pages import back, render
from server.dashboard.routes.common import Before, Form, page_router
from server.routes.common import JobId, Reader, Submitter, UsesServices, check_owner
from server.states import Move

router = page_router("/jobs/{job_id:id}")

# The report brings its own style along; in a sandbox it is a page of no origin, without scripts.
_REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)


@router.get("")
def show_job(
    request: Request, job_id: JobId, services: UsesServices, caller: Reader, before: Before = None
) -> Response:
    """Show a job."""
    page = job_page(services.database, services.jobs.get(job_id), before)
    return render(request, "job.html", page=page, before=before, trial_href=_trial_href(job_id))


@router.get("/live")
def show_job_live(
    request: Request, job_id: JobId, services: UsesServices, caller: Reader, before: Before = None
) -> Response:
    """Show the parts of a job's page that change."""
    page = job_page(services.database, services.jobs.get(job_id), before)
    return render(
        request, "parts/job.html", page=page, before=before, trial_href=_trial_href(job_id)
    )


@router.get("/report")
def show_report(job_id: JobId, services: UsesServices, caller: Reader) -> Response:
    """Show the self-contained report, in a sandbox."""
    row = artifacts.found(services.database, job_id, REPORT)
    path = artifacts.path_of(services.settings.artifacts_dir, row)
    headers = {
        "Content-Security-Policy": _REPORT_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
    }
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)


@router.post("/cancel")
def cancel(job_id: JobId, services: UsesServices, caller: Submitter, form: Form) -> Response:
    """End a job for good."""
    check_owner(caller, services.jobs.get(job_id).owner)
    services.jobs.ask(job_id, Move.CANCEL)
    return _back(job_id, form)


@router.post("/pause")
def pause(job_id: JobId, services: UsesServices, caller: Submitter, form: Form) -> Response:
    """Let the running trial end, then free the worker."""
    check_owner(caller, services.jobs.get(job_id).owner)
    services.jobs.ask(job_id, Move.PAUSE)
    return _back(job_id, form)


@router.post("/resume")
def resume(job_id: JobId, services: UsesServices, caller: Submitter, form: Form) -> Response:
    """Go on with a job, from its stored trials."""
    check_owner(caller, services.jobs.get(job_id).owner)
    services.jobs.ask(job_id, Move.RESUME)
    return _back(job_id, form)


def _trial_href(job_id: str) -> Callable[[int], str]:
    return lambda number: f"/jobs/{job_id}/trials/{number}"


def _back(job_id: str, form: dict[str, str]) -> Response:
    """Lead to where the form was: the list, or the job."""
    return back("/" if form.get("from") == "list" else f"/jobs/{job_id}")
