"""Logging: plain lines or JSON, with what is being worked on, and without secrets."""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_context: ContextVar[Mapping[str, Any]] = ContextVar("what is being worked on", default=_NOTHING)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRETS = (
    (re.compile(r"\bacc_[\w-]{20,}"), "acc_***"),
    (re.compile(r"\bses_[\w.-]{20,}"), "ses_***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"(\w+://[^\s:/@]*):[^\s/@]+@"), r"\1:***@"),  # the password of a database URL
)
_QUIET = ("httpx", "httpx2", "httpcore", "alembic")


@contextmanager
def bind(**values: Any) -> Iterator[None]:
    """Add these names, such as request_id, job_id or trial, to every line logged inside."""
    before = _context.set({**_context.get(), **values})
    try:
        yield
    finally:
        _context.reset(before)


def setup(as_json: bool, level: int | str = logging.INFO) -> None:
    """Send the log of the whole process to stderr; call it once, where the process starts.

    uvicorn must be run with `log_config=None`; its own access log is off, as the service writes one
    line a request itself.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").disabled = True
    logging.captureWarnings(True)


def redact(text: str) -> str:
    """Return the text with tokens, sessions and passwords struck out."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the context and `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context.get(),
            **_extra(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str, ensure_ascii=False))


class PlainFormatter(logging.Formatter):
    """A line for people: time, level, logger, message, and the context in brackets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and below it the traceback, if any."""
        context = " ".join(f"{name}={value}" for name, value in _context.get().items())
        shown = _one_line(record.getMessage()) + (f" [{context}]" if context else "")
        moment = _time(record).strftime("%Y-%m-%d %H:%M:%S")
        text = f"{moment} {record.levelname:<7} {record.name}: {shown}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _one_line(message: str) -> str:
    """Return the message with its line breaks spelled out, so that nobody can forge a line."""
    return message.replace("\r", "\\r").replace("\n", "\\n")
