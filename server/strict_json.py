"""What every database and every reader takes as JSON: no NaN or inf, only Unicode, nothing deep."""

import json
from collections.abc import Iterable
from typing import Any

MOST_LEVELS = 100
_TOO_DEEP = f"lists and objects nest deeper than {MOST_LEVELS} levels"


def check(value: Any) -> None:
    """Raise ValueError for plain data that is not strict JSON."""
    _check_levels(value)
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text that is not Unicode: half of a surrogate pair") from error
    except ValueError as error:
        raise ValueError("NaN and inf are no JSON numbers") from error


def loads(text: str) -> Any:
    """Return the value of a JSON text, whose numbers may be NaN; raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_levels(value)
    return value


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [part for one in level for part in _parts(one)]
    if any(isinstance(one, dict | list | tuple) for one in level):
        raise ValueError(_TOO_DEEP)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
