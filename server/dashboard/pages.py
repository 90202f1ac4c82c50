"""Rendering: the templates, what every page knows, and errors as pages."""

import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader

from server.auth import CSRF_FIELD, SESSION_COOKIE, Caller, Scope, needs_token
from server.dashboard import words
from server.errors import ServerError, UnauthenticatedError
from server.services import Services
from tuner.report.page import SHADES, html_environment

STATIC = Path(__file__).parent / "static"
FRAGMENT_HEADER = "X-Fragment"
_TITLES = {403: "Not allowed", 404: "Nothing is here", 409: "Not possible now", 503: "Out of order"}


@dataclass(frozen=True)
class Shell:
    """What every page knows of the request."""

    path: str
    caller: Caller | None
    has_login: bool
    csrf_field: str
    csrf_token: str

    @property
    def may_submit(self) -> bool:
        """Whether the caller may submit jobs."""
        return self.caller is not None and self.caller.may(Scope.SUBMIT)

    def may_change(self, owner: str) -> bool:
        """Return whether the caller may pause, resume and cancel a job of this owner."""
        if self.caller is None or not self.may_submit:
            return False
        return self.caller.owner == owner or self.caller.may(Scope.ADMIN)


def render(request: Request, template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """Return a page or a part of one; it is made anew for every request, so nobody keeps it."""
    html = _environment().get_template(template).render(shell=_shell(request), **context)
    return HTMLResponse(html, status, {"Cache-Control": "no-store"})


def back(path: str) -> RedirectResponse:
    """Return what lets a browser load a page after a form was taken."""
    return RedirectResponse(path, 303)


class PageRoute(APIRoute):
    """A route whose errors are pages; a browser without a session is led to the login."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap what answers the request."""
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await answer(request)
            except UnauthenticatedError as error:
                return _unauthenticated(request, error)
            except ServerError as error:
                return _error_page(request, error.status, str(error), dict(error.headers))
            except RequestValidationError as error:
                if any(one["loc"][0] == "path" for one in error.errors()):
                    return _error_page(request, 404, f"nothing is at {request.url.path!r}")
                found = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
                return _error_page(request, 422, f"the address cannot be read: {found}")

        return handler


def query(**values: str | int | None) -> str:
    """Return a query string of what is given."""
    given = {name: value for name, value in values.items() if value not in (None, "")}
    return f"?{urlencode(given)}" if given else ""


def _unauthenticated(request: Request, error: ServerError) -> Response:
    is_page = "text/html" in request.headers.get("accept", "") and request.method == "GET"
    if FRAGMENT_HEADER in request.headers or not is_page:
        return _error_page(request, error.status, str(error), dict(error.headers))
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/login?next={quote(wanted, safe='')}", 303)


def _error_page(
    request: Request, status: int, detail: str, headers: dict[str, str] | None = None
) -> Response:
    title = _TITLES.get(int(status), "That did not work")
    page = render(request, "error.html", int(status), title=title, detail=detail)
    page.headers.update(headers or {})
    return page


def _shell(request: Request) -> Shell:
    services: Services = request.app.state.services
    has_login = needs_token(services.settings)
    cookie = request.cookies.get(SESSION_COOKIE)
    return Shell(
        path=request.url.path,
        caller=getattr(request.state, "caller", None),
        has_login=has_login,
        csrf_field=CSRF_FIELD,
        csrf_token=services.sessions.csrf_token(cookie) if has_login and cookie else "",
    )


@cache
def _environment() -> Environment:
    own = PackageLoader("server.dashboard")
    shared = PrefixLoader({"report": PackageLoader("tuner.report", ".")})
    environment = html_environment(ChoiceLoader([own, shared]))
    environment.filters |= {
        "ago": words.ago,
        "clock": words.clock,
    }
    environment.globals |= {
        "asset": _asset,
        "query": query,
        "shades": SHADES,
        "objectives": words.OBJECTIVES,
        "stopped": words.STOPPED,
    }
    return environment


@cache
def _asset(name: str) -> str:
    """Return the address of a static file, which changes with what is in it."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()
    return f"/static/{name}?v={digest[:12]}"
