"""A service that needs tokens, and headers that carry them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.app import create_app
from server.auth import Scope
from server.settings import Settings


class LocalClient(TestClient):
    """A client of an application in this process, at an address that is allowed."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__(app, base_url="http://127.0.0.1", **options)


def on_sqlite(folder: Path, **fields: Any) -> Settings:
    """Return settings for what does not depend on the database, without a limit in the way."""
    return Settings(data_dir=folder, requests_per_minute=1_000_000, **fields)


def with_changes(settings: Settings, **changes: Any) -> Settings:
    """Return settings with some of another value, which is not validated."""
    return settings.model_copy(update=changes)


@contextmanager
def guarded(settings: Settings, **changes: Any) -> Iterator[TestClient]:
    """Run a service that needs tokens."""
    app = create_app(with_changes(settings, auth=True, **changes))
    with LocalClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


def app_of(client: TestClient) -> FastAPI:
    """Return the application behind a client."""
    assert isinstance(client.app, FastAPI)
    return client.app


def bearer(client: TestClient, *scopes: Scope, name: str = "someone") -> dict[str, str]:
    """Make a token; return the header that carries it."""
    _, secret = app_of(client).state.services.tokens.create(name, scopes)
    return {"Authorization": f"Bearer {secret}"}
