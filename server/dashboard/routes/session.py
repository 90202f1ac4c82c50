"""Logging in with a token, and out."""

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from server.auth import PUBLIC, needs_token
from server.dashboard.pages import back, render
from server.dashboard.routes.common import Form, page_router
from server.errors import UnauthenticatedError
from server.routes.common import UsesServices

router = page_router()


@router.get("/login", openapi_extra=PUBLIC)
def show_login(request: Request, services: UsesServices, next: str = "/") -> Response:
    """Ask for a token."""
    if not needs_token(services.settings):
        return back("/")
    return render(request, "login.html", next=_own(next), error=None)


@router.post("/login", openapi_extra=PUBLIC)
async def login(request: Request, services: UsesServices, form: Form) -> Response:
    """Open a session by a token."""
    target = _own(form.get("next", "/"))
    answer = back(target)
    secret = form.get("token", "").strip()
    is_secure = request.url.scheme == "https"
    found = await run_in_threadpool(services.sessions.login, answer, secret, is_secure)
    if found is None:
        refused = UnauthenticatedError("This token is unknown, expired or revoked.")
        page = render(request, "login.html", 401, next=target, error=str(refused))
        page.headers.update(refused.headers)
        return page
    return answer


@router.post("/logout")
def logout(request: Request, services: UsesServices) -> Response:
    """End the session in this browser."""
    answer = back("/login")
    services.sessions.logout(answer, request.url.scheme == "https")
    return answer


def _own(path: str) -> str:
    """Return a path of this site; `/` for anything that could lead elsewhere."""
    is_own = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if is_own and "\\" not in path else "/"
