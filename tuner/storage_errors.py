"""Errors of a storage's database: what they mean, and which of them may pass."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)

from tuner.errors import StorageError

T = TypeVar("T")

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_ADVICE = {
    "unable to open database file": "the folder must exist and the file must be writable",
    "readonly database": "the file or its folder is read-only: choose another place",
    "not a database": "the file is of another kind or damaged: choose another one",
    "malformed": "the file is damaged: restore a copy or choose another one",
    "locked": "another process holds the database: end it, or wait and run again to resume",
    "is full": "make room and run again with the same study_name: stored trials are kept",
    "disk i/o error": "check the disk and run again with the same study_name to resume",
    "connection": "is the server running, and are host, user, password and database right?",
}


def patiently(access: Callable[[], T], engine: Engine, patience_s: float) -> T:
    """Return what `access` returns; call it again for some seconds while the database is away.

    Errors of the database become a StorageError, except IntegrityError, which is the caller's.
    """
    deadline = time.monotonic() + patience_s
    pause = _FIRST_PAUSE_S
    while True:
        try:
            with _storage_errors(engine):
                return access()
        except StorageError as error:
            if not may_pass(error) or time.monotonic() + pause > deadline:
                raise
            _log.warning("%s: trying again", error)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def may_pass(error: StorageError) -> bool:
    """Whether the database was away, locked or full, and may come back."""
    cause = error.__cause__
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    return isinstance(cause, (OperationalError, InterfaceError))


def shown(engine: Engine) -> str:
    """Return the URL of the database, its password hidden."""
    return engine.url.render_as_string(hide_password=True)


@contextmanager
def _storage_errors(engine: Engine) -> Iterator[None]:
    """Turn errors of the database into a StorageError; IntegrityError is left to the caller."""
    try:
        yield
    except IntegrityError:
        raise
    except SQLAlchemyError as error:
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        advice = next((tip for key, tip in _ADVICE.items() if key in cause.lower()), None)
        raise StorageError(
            f"storage {shown(engine)}: {cause}" + (f" (tip: {advice})" if advice else "")
        ) from error
