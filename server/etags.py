"""Entity tags and the conditions that requests make with them (RFC 9110, section 8.8 and 13)."""


def strong(value: object) -> str:
    """Return the strong entity tag of a value without quotes in it."""
    return f'"{value}"'


def is_among(tag: str, header: str | None) -> bool:
    """Return whether If-None-Match names the tag; weak comparison, as that header wants it."""
    if header is None:
        return False
    if header.strip() == "*":
        return True
    return tag in (one.strip().removeprefix("W/") for one in header.split(","))
