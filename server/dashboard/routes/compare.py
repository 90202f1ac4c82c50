"""Two jobs side by side."""

from fastapi import Request, Response

from server.dashboard.compare_view import compare
from server.dashboard.jobs_view import cards
from server.dashboard.pages import render
from server.dashboard.routes.common import GivenId, page_router
from server.routes.common import Reader, UsesServices

router = page_router("/compare")

_CHOICES = 100


@router.get("")
def show_comparison(
    request: Request, services: UsesServices, caller: Reader, a: GivenId = "", b: GivenId = ""
) -> Response:
    """Show two jobs, once both are chosen."""
    found = None
    if a and b:
        found = compare(services.database, services.jobs.get(a), services.jobs.get(b))
    jobs = cards(services.database, services.jobs.page(_CHOICES))
    known = {job.id for job in jobs}
    extra = [services.jobs.get(one) for one in dict.fromkeys((a, b)) if one and one not in known]
    jobs += cards(services.database, extra)
    return render(request, "compare.html", found=found, jobs=jobs, a=a, b=b)
