"""Hang the dashboard into the application."""

from fastapi import APIRouter, FastAPI
from fastapi.staticfiles import StaticFiles

from server.dashboard.pages import STATIC
from server.dashboard.routes import compare, job, jobs, session, studies, submit, trial, workers

router = APIRouter(include_in_schema=False)
for _part in (jobs, job, trial, submit, compare, studies, workers, session):
    router.include_router(_part.router)


def mount(app: FastAPI) -> None:
    """Add all pages, and under /static what they load."""
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
