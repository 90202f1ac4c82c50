"""Cursors, entity tags, ranges and JSON: what clients send, and what becomes of it."""

import pytest

from server import cursors, etags, ranges, strict_json
from server.errors import InvalidError, RangeError


@pytest.mark.parametrize("last", ["0", "01k9yv6mzj8x7w3c5r2q4t0abd", "9" * 18])
def test_a_cursor_leads_back(last: str) -> None:
    cursor = cursors.encode("jobs", last)
    assert cursor.isascii()
    assert not set(cursor) & set("=+/:")
    assert cursors.decode("jobs", cursor) == last


def test_a_cursor_of_a_number_leads_back() -> None:
    assert cursors.decode_number("trials", cursors.encode("trials", 12)) == 12
    last = cursors.encode("events", 2**63 - 1)
    assert cursors.decode_number("events", last, 2**63 - 1) == 2**63 - 1


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "a",
        "!!!!",
        "é",
        cursors.encode("trials", 3),
        cursors.encode("jobs", ""),
        cursors.encode("jobs", "a b"),
        cursors.encode("jobs", "é"),
        cursors.encode("jobs", "\0"),
        cursors.encode("jobs", 3) + "\n",
    ],
)
def test_anything_else_is_no_cursor(cursor: str) -> None:
    with pytest.raises(InvalidError, match="not a cursor of this list"):
        cursors.decode("jobs", cursor)


@pytest.mark.parametrize("last", ["x", "-1", "9" * 19, str(2**31)])
def test_anything_else_is_no_cursor_of_a_number(last: str) -> None:
    with pytest.raises(InvalidError):
        cursors.decode_number("jobs", cursors.encode("jobs", last))


@pytest.mark.parametrize(
    ("header", "is_named"),
    [
        (None, False),
        ("", False),
        ('"7"', True),
        ('W/"7"', True),
        ("7", False),
        ('"6", "7"', True),
        ('"6" , W/"7"', True),
        ('"77"', False),
        ("*", True),
    ],
)
def test_if_none_match(header: str | None, is_named: bool) -> None:
    assert etags.is_among(etags.strong(7), header) == is_named


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=2-4", (2, 5)),
        ("bytes=2-", (2, 10)),
        ("bytes=2-99", (2, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("BYTES= 2-4 ", (2, 5)),
        # ignored, as the standard allows
        ("bytes=4-2", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes", None),
        ("bytes=0-" + "9" * 5000, None),
    ],
)
def test_ranges_of_ten_bytes(header: str | None, part: tuple[int, int] | None) -> None:
    assert ranges.wanted(header, 10) == part


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_without_bytes_is_refused(header: str, size: int) -> None:
    with pytest.raises(RangeError, match=f"{size} bytes") as caught:
        ranges.wanted(header, size)
    assert caught.value.headers == {"Content-Range": f"bytes */{size}"}


@pytest.mark.parametrize("levels", [101, 1000, 100_000])
def test_json_nests_100_levels_and_no_more(levels: int) -> None:
    strict_json.check(strict_json.loads("[" * 100 + "1" + "]" * 100))
    with pytest.raises(ValueError, match="deeper than 100 levels"):
        strict_json.loads("[" * levels + "1" + "]" * levels)
