"""Where the next page of a list begins: opaque to clients."""

import base64
import binascii

from server.errors import InvalidError


def encode(kind: str, last: str | int) -> str:
    """Return the cursor of the page that follows the item `last` of a list of this kind."""
    text = f"{kind}:{last}".encode()
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def decode(kind: str, cursor: str) -> str:
    """Return the item that the page follows; raises InvalidError on anything else."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError, ValueError) as error:
        raise _invalid(cursor) from error
    found, _, last = text.partition(":")
    if found != kind or not last.isascii() or not last.isalnum():
        raise _invalid(cursor)
    return last


def decode_number(kind: str, cursor: str, most: int = 2**31 - 1) -> int:
    """Return the number that the page follows; raises InvalidError on anything else.

    `most` is what the database's column can hold.
    """
    last = decode(kind, cursor)
    if not last.isdigit() or len(last) > len(str(most)) or int(last) > most:
        raise _invalid(cursor)
    return int(last)


def _invalid(cursor: str) -> InvalidError:
    detail = "not a cursor of this list: give what `next_cursor` of its last page was, or none"
    place = {"detail": detail, "in": "query", "parameter": "cursor"}
    return InvalidError(f"cursor {cursor[:40]!r} is {detail}", errors=[place])
