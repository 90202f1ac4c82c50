"""Waiting for a database that is away."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from server.errors import DatabaseError

T = TypeVar("T")

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


def patiently(access: Callable[[], T], patience_s: float) -> T:
    """Return what `access` returns; call it again for some seconds after a DatabaseError."""
    deadline = time.monotonic() + patience_s
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return access()
        except DatabaseError as error:
            if time.monotonic() + pause > deadline:
                raise
            _log.warning("%s: trying again", error)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
