"""A service that listens on a real port, and a wire to it that breaks as often as wanted."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.settings import Settings

_START_S = 30.0
_CHUNK = 1 << 16


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Run an application in a thread; give its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + _START_S
            while not server.started and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def service(settings: Settings) -> Iterator[tuple[str, FastAPI]]:
    """Run the service; give its URL and the application."""
    app = create_app(settings)
    with listening(app) as url:
        yield url, app


@dataclass(frozen=True)
class Cut:
    """What happens to one connection: the bytes of answers that pass before it is reset.

    `request` False resets it before the service sees anything.
    """

    after_bytes: int = 0
    request: bool = True


@dataclass
class Proxy:
    """Passes connections on to a service. `cut` says what happens to the n-th, None for nothing.

    Each connection carries one request, so that what is cut can be told. `requests` keeps what
    clients sent.
    """

    port: int
    cut: Callable[[int], Cut | None]
    requests: list[bytes] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        """Listen while inside."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            try:
                yield self
            finally:
                listener.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        number = 0
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                connection, _ = listener.accept()
                arguments = (connection, self.cut(number))
                threading.Thread(target=self._pass, args=arguments, daemon=True).start()
                number += 1

    def _pass(self, near: socket.socket, cut: Cut | None) -> None:
        with near, contextlib.suppress(OSError):
            if cut is not None and not cut.request:
                return _reset(near)
            with socket.create_connection(("127.0.0.1", self.port)) as far:
                request = _one_request(near)
                self.requests.append(request)
                far.sendall(request)
                self._answer(near, far, cut)

    def _answer(self, near: socket.socket, far: socket.socket, cut: Cut | None) -> None:
        left = None if cut is None else cut.after_bytes
        while left is None or left > 0:
            chunk = far.recv(_CHUNK if left is None else min(left, _CHUNK))
            if not chunk:
                return
            near.sendall(chunk)
            left = None if left is None else left - len(chunk)
        far.recv(1)  # the service did what it was asked for
        _reset(near)


def _one_request(near: socket.socket) -> bytes:
    """Read a request whole, and ask the service to close the connection after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += near.recv(_CHUNK)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    lengths = [line for line in lines if line.lower().startswith(b"content-length:")]
    length = int(lengths[0].partition(b":")[2]) if lengths else 0
    while len(body) < length:
        body += near.recv(_CHUNK)
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body


def _reset(connection: socket.socket) -> None:
    """End a connection the hard way, as a network that fails does."""
    time.sleep(0.01)  # let what was sent arrive: a reset may overtake it
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
