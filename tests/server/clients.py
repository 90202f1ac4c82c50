"""Both clients behind one face, so that every test runs on each."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

from server.client import AsyncClient, Client


class Blocking:
    """An AsyncClient whose methods wait, in an event loop of another thread."""

    def __init__(self, portal: BlockingPortal, client: AsyncClient) -> None:
        self._portal = portal
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._portal.call(self._result, name, args, kwargs)

        return call

    async def _result(self, name: str, args: Any, kwargs: Any) -> Any:
        answer = getattr(self._client, name)(*args, **kwargs)
        if isawaitable(answer):
            return await cast(Awaitable[Any], answer)
        return self._items(answer)

    def _items(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items, None)

        while (item := self._portal.call(following)) is not None:
            yield item


@contextmanager
def connected(kind: str, url: str, **options: Any) -> Iterator[Client]:
    """Give a client of the kind `sync` or `async`."""
    if kind == "sync":
        with Client(url, **options) as client:
            yield client
        return
    with start_blocking_portal() as portal:
        client = portal.call(lambda: _made(url, options))
        try:
            yield cast(Client, Blocking(portal, client))
        finally:
            portal.call(client.close)


async def _made(url: str, options: Any) -> AsyncClient:
    return AsyncClient(url, **options)
