"""Whether the service lives, and whether it can do its work."""

from fastapi import APIRouter

from server.auth import PUBLIC
from server.db import is_current
from server.errors import NotReadyError
from server.problems import declared
from server.routes.common import UsesServices
from server.schemas import Health
from tuner.version import VERSION

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="get_health", summary="Is it alive?", openapi_extra=PUBLIC)
async def get_health() -> Health:
    """Answer, whatever the database does."""
    return Health(status="ok", version=VERSION)


@router.get(
    "/readyz",
    operation_id="get_readiness",
    summary="Can it work?",
    openapi_extra=PUBLIC,
    responses=declared(503),
)
def get_readiness(services: UsesServices) -> Health:
    """Answer with 503 where the database does not, or has the tables of another version."""
    if not is_current(services.database):
        raise NotReadyError("the database has the tables of another version: tuner db upgrade")
    return Health(status="ok", version=VERSION)
