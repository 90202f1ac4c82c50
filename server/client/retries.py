"""Which failed requests are sent again, and after how long."""

import random
from dataclasses import dataclass

import httpx

from server.client.errors import ApiError, UnreachableError

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0
_LONGEST_RETRY_AFTER_S = 60.0
_TRANSIENT = (429, 502, 503, 504)
# the request never reached the service
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
# the request itself cannot be sent
_HOPELESS = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)


@dataclass
class Attempts:
    """The attempts of one request.

    What was refused (429) or never sent is tried again in any case, everything else only where
    the request `is_repeatable`: where sending it twice does no more than sending it once.
    """

    url: str
    is_repeatable: bool
    retries: int
    failures: int = 0

    def pause_s(self, error: httpx.TransportError | ApiError) -> float:
        """Return how long to wait before the next attempt; raises ClientError if there is none."""
        self.failures += 1
        if self.failures > self.retries or not self._may_repeat(error):
            if isinstance(error, ApiError):
                raise error
            raise self._unreachable(error) from error
        asked = error.retry_after_s if isinstance(error, ApiError) else None
        return self._backoff_s() if asked is None else asked + random.random() * _FIRST_PAUSE_S

    def _may_repeat(self, error: httpx.TransportError | ApiError) -> bool:
        if not isinstance(error, ApiError):
            is_worth_it = not isinstance(error, _HOPELESS)
            return is_worth_it and (self.is_repeatable or isinstance(error, _NOT_SENT))
        if error.status not in _TRANSIENT or (error.retry_after_s or 0) > _LONGEST_RETRY_AFTER_S:
            return False
        return self.is_repeatable or error.status == 429

    def _backoff_s(self) -> float:
        """Return a random part of a time that doubles, so that clients do not come back at once."""
        longest = min(_FIRST_PAUSE_S * 2.0 ** (self.failures - 1), _LONGEST_PAUSE_S)
        return longest * random.uniform(0.5, 1.0)

    def _unreachable(self, error: httpx.TransportError) -> UnreachableError:
        if isinstance(error, _NOT_SENT):
            text = f"nothing answers at {self.url}: start the service with `tuner serve`, or set "
            return UnreachableError(f"{text}ACCUTUNE_URL to where it runs ({error})")
        text = f"the connection to {self.url} was lost ({type(error).__name__}: {error})"
        if not self.is_repeatable:
            text += "; whether the request took effect is not known"
        return UnreachableError(text)
