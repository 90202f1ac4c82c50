"""Library runs in the same store."""

from dataclasses import replace
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import Path, Query, Request, Response

from server.dashboard import charts, studies_view, trials_view
from server.dashboard.pages import render
from server.dashboard.routes.common import Before, page_router
from server.dashboard.trial_view import trial_page
from server.routes.common import Reader, UsesServices, cut
from tuner.report.scatter import scatter

router = page_router("/studies")

PAGE = 50
_Name = Annotated[str, Path(max_length=255, pattern=r"^[^\x00]+$")]
_Cost = Annotated[Literal["bops", "size"], Query()]


@router.get("")
def show_studies(
    request: Request, services: UsesServices, caller: Reader, before: Before = None
) -> Response:
    """Show the studies, newest first."""
    found, last = cut(studies_view.page(services.database, PAGE + 1, before), PAGE)
    return render(
        request,
        "studies.html",
        studies=found,
        older=None if last is None else last.id,
        before=before,
        href=_href,
    )


@router.get("/{name:path}/trials/{number:number}")
def show_study_trial(
    request: Request,
    name: _Name,
    number: int,
    services: UsesServices,
    caller: Reader,
    against: Before = None,
) -> Response:
    """Show a trial of a study."""
    studies_view.header(services.database, name)
    search, _ = studies_view.search(services.database, name, "bops")
    page = trial_page(services, name, search, number, against)
    return render(request, "trial.html", page=page, owner_name=name, owner_href=_href(name))


@router.get("/{name:path}")
def show_study(
    request: Request,
    name: _Name,
    services: UsesServices,
    caller: Reader,
    cost: _Cost = "bops",
    before: Before = None,
) -> Response:
    """Show a study."""
    created_at, header = studies_view.header(services.database, name)
    search, knows_goal = studies_view.search(services.database, name, cost)
    source = search.source()
    plot = scatter(source) if source is not None else None
    history = charts.history(search)
    if plot is not None and not knows_goal:
        plot = replace(plot, goal_y=None)
    if history is not None and not knows_goal:
        history = replace(history, panels=tuple(replace(p, level=None) for p in history.panels))
    baseline = search.baseline.accuracy if search.baseline is not None else None
    return render(
        request,
        "study.html",
        name=name,
        href=_href(name),
        trial_href=lambda number: f"{_href(name)}/trials/{number}",
        created_at=created_at,
        header=header,
        search=search,
        cost=cost,
        goal=search.config.goal.describe(baseline) if knows_goal else None,
        plot=plot,
        history=history,
        table=trials_view.table(services.database, name, search, before),
    )


def _href(name: str) -> str:
    return f"/studies/{quote(name, safe='')}"
