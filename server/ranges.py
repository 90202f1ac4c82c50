"""The part of a file that a request wants (RFC 9110, section 14)."""

import re

from server.errors import RangeError

_SINGLE = re.compile(r"bytes=\s*(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))\s*", re.IGNORECASE)


def wanted(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return the begin and the end (exclusive) of a single range, None for the whole file.

    Several ranges, other units and what is malformed are ignored, as the standard allows. Raises
    RangeError where no byte of the range exists.
    """
    match = None if header is None else _SINGLE.fullmatch(header)
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        begin, end = max(size_bytes - int(suffix), 0), size_bytes
    else:
        begin, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < int(first):
            return None
    if begin >= end:
        raise RangeError(
            f"the range {header!r} is outside of the {size_bytes} bytes that there are",
            size_bytes=size_bytes,
        )
    return begin, end
