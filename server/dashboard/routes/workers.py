"""The workers and the queue."""

from fastapi import Request, Response

from server import workers
from server.dashboard import queue
from server.dashboard.pages import render
from server.dashboard.routes.common import page_router
from server.routes.common import Reader, UsesServices
from server.services import Services

router = page_router("/workers")

_SHOWN = 100


@router.get("")
def show_workers(request: Request, services: UsesServices, caller: Reader) -> Response:
    """Show the workers and the queue."""
    return _page(request, services, "workers.html")


@router.get("/live")
def show_workers_live(request: Request, services: UsesServices, caller: Reader) -> Response:
    """Show the part that changes: all of it."""
    return _page(request, services, "parts/workers.html")


def _page(request: Request, services: Services, template: str) -> Response:
    found = workers.listed(services.database, services.settings.lease_s, _SHOWN)
    gone = ("ended", "lost")
    return render(
        request,
        template,
        workers=[worker for worker in found if worker.state not in gone],
        gone=[worker for worker in found if worker.state in gone],
        queue=queue.state(services.database),
    )
