"""The application: all routes, put together."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
from fastapi import Depends, FastAPI
from starlette.concurrency import run_in_threadpool

from server import dashboard, middleware, problems
from server.auth import authenticate, needs_token
from server.problems import declared
from server.routes import (
    artifacts,
    assets,
    events,
    health,
    jobs,
    metrics,
    recipes,
    tokens,
    trials,
    workers,
)
from server.schemas import Problem
from server.services import Services
from server.settings import Settings
from server.startup import check_exposure
from tuner.version import VERSION

_ROUTERS = (
    jobs.router,
    trials.router,
    events.router,
    artifacts.router,
    recipes.router,
    assets.router,
    workers.router,
    tokens.router,
    health.router,
    metrics.router,
)
_TAGS = [
    {"name": "jobs", "description": "Tuning jobs: a recipe, its parameters, a configuration."},
    {"name": "trials", "description": "What a job's search found."},
    {"name": "events", "description": "What happens to a job, live."},
    {"name": "artifacts", "description": "The files that a job left."},
    {"name": "recipes", "description": "What jobs can be made of."},
    {"name": "assets", "description": "Uploads of weights and data for recipes."},
    {"name": "workers", "description": "Who runs the jobs."},
    {"name": "tokens", "description": "Who may call; for admins."},
    {"name": "health", "description": "For probes, without a token; and for Prometheus."},
]
_BEARER = {"type": "http", "scheme": "bearer", "description": "`tuner token create` makes one."}


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the application; what it needs is opened when it starts, and closed when it ends."""
    settings = settings or Settings()
    app = FastAPI(
        title="accutune",
        summary="Tuning jobs: the cheapest quantized model that still meets your accuracy goal.",
        version=VERSION,
        docs_url=None,  # its scripts would come from a CDN
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(settings),
        dependencies=[Depends(authenticate)],
        responses=declared(400, 401, 403, 422, 429, 500, 503),
        openapi_tags=_TAGS,
    )
    problems.install(app)
    middleware.install(app, settings)
    for router in _ROUTERS:
        app.include_router(router)
    dashboard.mount(app)
    _describe(app, settings)
    return app


def _lifespan(settings: Settings) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = await run_in_threadpool(Services.open, settings)
        try:
            await run_in_threadpool(check_exposure, settings, services.tokens)
            app.state.services = services
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(services.hub.run)
                yield
                services.hub.close()
                tasks.cancel_scope.cancel()
        finally:
            services.close()

    return lifespan


def _describe(app: FastAPI, settings: Settings) -> None:
    """Add to the OpenAPI document what FastAPI does not know: problems, and bearer tokens."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        components = document.setdefault("components", {})
        components.setdefault("schemas", {})["Problem"] = Problem.model_json_schema()
        components["securitySchemes"] = {"bearer": _BEARER}
        document["security"] = _security(settings)
        return document

    app.openapi = described  # type: ignore[method-assign]


def _security(settings: Settings) -> list[dict[str, list[str]]]:
    """Return what OpenAPI says of tokens; an empty one means that there need not be any."""
    return [{"bearer": []}] if needs_token(settings) else [{}, {"bearer": []}]
