"""The HTTP server: its socket, and a shutdown that streams do not hold up."""

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from server.errors import SettingsError
from server.settings import Settings

_BACKLOG = 2048
_SHUTDOWN_S = 10


@contextmanager
def bound(settings: Settings) -> Iterator[socket.socket]:
    """Give a socket that listens where the settings say; raises SettingsError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
            yield listener
    except OSError as error:
        raise SettingsError(_reason(settings, error)) from error


def url_of(listener: socket.socket) -> str:
    """Return the URL under which this machine reaches a socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, when_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; raises SettingsError if the application does not start."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever calls from this machine could claim any address
        timeout_graceful_shutdown=_SHUTDOWN_S,
        lifespan="on",
    )
    server = _Server(config, app, when_ready)
    server.run(sockets=[listener])
    if not server.started:
        raise SettingsError("the service did not start: its log above says why")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, when_ready: Callable[[], None]):
        super().__init__(config)
        self._app = app
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams of events first: uvicorn would wait for them."""
        self._app.state.services.hub.close()
        await super().shutdown(sockets)


def _reason(settings: Settings, error: OSError) -> str:
    where = f"{settings.host} port {settings.port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where} is in use already, maybe by another `tuner serve`: end that one, or choose "
            "another port with --port"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{where} may not be used by this user: choose a port from 1024 on with --port"
    return f"{where} cannot be listened on: {error.strerror or error}"
