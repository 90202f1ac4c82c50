"""The list of jobs."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request, Response

from server.dashboard.jobs_view import JobCard, cards
from server.dashboard.pages import query, render
from server.dashboard.routes.common import page_router
from server.routes.common import Reader, UsesServices, cut
from server.services import Services
from server.states import ACTIVE, ENDED, State

router = page_router()

PAGE = 25
_GROUPS: dict[str, tuple[State, ...]] = {
    "live": tuple(state for state in State if state not in ENDED),
    "active": ACTIVE,
    "ended": ENDED,
}
_Text = Annotated[str, Query(max_length=600, pattern=r"^[^\x00]*$")]


@dataclass(frozen=True)
class Filter:
    """What the list is narrowed down to; empty is everything."""

    state: str
    recipe: str
    owner: str
    label: str

    @property
    def is_on(self) -> bool:
        """Whether anything is left out."""
        return any((self.state, self.recipe, self.owner, self.label))

    @property
    def states(self) -> tuple[State, ...]:
        """The states that are shown."""
        if self.state in _GROUPS:
            return _GROUPS[self.state]
        return tuple(state for state in State if state == self.state)

    @property
    def pair(self) -> tuple[str, str] | None:
        """The label's name and value."""
        name, _, value = self.label.partition(":")
        return (name.strip(), value.strip()) if self.label else None

    def query(self, before: str | None = None) -> str:
        """Return the query string of a page of this list."""
        return query(
            state=self.state, recipe=self.recipe, owner=self.owner, label=self.label, before=before
        )


def _filter(state: _Text = "", recipe: _Text = "", owner: _Text = "", label: _Text = "") -> Filter:
    return Filter(state.strip(), recipe.strip(), owner.strip(), label.strip())


Filtered = Annotated[Filter, Depends(_filter)]
Before = Annotated[str | None, Query(pattern=r"^[0-9a-z]{26}$")]


@router.get("/")
def show_jobs(
    request: Request,
    services: UsesServices,
    caller: Reader,
    wanted: Filtered,
    before: Before = None,
) -> Response:
    """Show the jobs, newest first."""
    found, older = _page(services, wanted, before)
    return render(
        request,
        "jobs.html",
        jobs=found,
        older=older,
        before=before,
        filter=wanted,
        recipes=[recipe.name for recipe in services.catalog.recipes],
        states=list(State),
    )


@router.get("/jobs/live")
def show_jobs_live(
    request: Request,
    services: UsesServices,
    caller: Reader,
    wanted: Filtered,
    before: Before = None,
) -> Response:
    """Show the part of the list that changes."""
    found, older = _page(services, wanted, before)
    return render(request, "parts/jobs.html", jobs=found, older=older, before=before, filter=wanted)


def _page(
    services: Services, wanted: Filter, before: str | None
) -> tuple[list[JobCard], str | None]:
    found = services.jobs.page(
        PAGE + 1,
        before=before,
        owner=wanted.owner or None,
        states=wanted.states,
        recipe=wanted.recipe or None,
        label=wanted.pair,
    )
    rows, last = cut(found, PAGE)
    return cards(services.database, rows), None if last is None else last.id
