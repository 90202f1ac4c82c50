"""What every database and every reader takes as JSON: no NaN or inf, and only Unicode text."""

import json
from typing import Any


def check(value: Any) -> None:
    """Raise ValueError for plain data that is not strict JSON."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text that is not Unicode: half of a surrogate pair") from error
    except ValueError as error:
        raise ValueError("NaN and inf are no JSON numbers") from error
