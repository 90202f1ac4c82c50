"""Where the service is, and who asks."""

import ipaddress
import os
import uuid
from collections.abc import Mapping
from typing import Any

import httpx

from server.client.calls import Call
from server.client.errors import AddressError
from server.client.retries import Attempts
from server.schemas import Submission
from tuner.config import TuningConfig
from tuner.version import VERSION

DEFAULT_URL = "http://127.0.0.1:8765"
_URL = "ACCUTUNE_URL"
_TOKEN = "ACCUTUNE_TOKEN"
_STREAM_SILENCE_S = 60.0  # the service sends something every 15 s


class Address:
    """The service's URL, the caller's token, and how patient the caller is.

    What is not given comes from ACCUTUNE_URL and ACCUTUNE_TOKEN.
    """

    def __init__(self, url: str | None, token: str | None, timeout_s: float, retries: int) -> None:
        self.url = _checked_url(url or os.environ.get(_URL) or DEFAULT_URL)
        self._token = _checked_token(token or os.environ.get(_TOKEN))
        self._timeout_s = timeout_s
        self._retries = retries

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.url)!r})"

    def options(self) -> dict[str, Any]:
        """Return the arguments of httpx's clients."""
        headers = {"User-Agent": f"accutune/{VERSION}"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        is_near = _is_loopback(self.url.host)
        return {
            "base_url": self.url,
            "headers": headers,
            "timeout": self._timeout_s,
            "trust_env": not is_near,  # a proxy has no way to this machine's own address
        }

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """Return the arguments of the request of a call, save the body of an upload."""
        return {
            "method": call.method,
            "url": call.path.removeprefix("/"),
            "params": dict(call.params),
            "headers": dict(call.headers),
            "content": call.body,
        }

    def stream_timeout(self) -> httpx.Timeout:
        """Return how long a stream of events may say nothing."""
        return httpx.Timeout(self._timeout_s, read=_STREAM_SILENCE_S)

    def attempts(self, call: Call[Any]) -> Attempts:
        """Return the attempts that a call has."""
        return Attempts(str(self.url), call.is_repeatable, self._retries)


def new_key() -> str:
    """Return an Idempotency-Key that nobody used before."""
    return uuid.uuid4().hex


def submission(
    recipe: str,
    params: Mapping[str, Any] | None,
    config: TuningConfig | Mapping[str, Any] | None,
    **more: Any,
) -> Submission:
    """Return what is submitted; raises pydantic.ValidationError for what it cannot be."""
    given = {} if config is None else config
    config = given if isinstance(given, TuningConfig) else TuningConfig.model_validate(given)
    return Submission(recipe=recipe, params=dict(params or {}), config=config, **more)


def _checked_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise AddressError(f"{text!r} is no URL ({error}): give http://host:port") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise AddressError(f"{text!r} is no URL of a service: give http://host:port")
    return url


def _checked_token(token: str | None) -> str | None:
    if token is not None and not (token.isascii() and token.isprintable()):
        raise AddressError(
            "the token has characters that no token has: copy it again, without line breaks"
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
