"""Names of rows that grow with time, so that their order is the order of creation."""

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32
_RANDOM_BITS = 80
_LENGTH = 26


class _Numbers:
    """Numbers that grow with every call of this process, also within a millisecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        """Return the time in milliseconds, then 80 bits: random, or one more than the last."""
        moment = time.time_ns() // 1_000_000
        fresh = moment << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            is_later = moment > self._last >> _RANDOM_BITS
            self._last = fresh if is_later else self._last + 1
            return self._last


_NUMBERS = _Numbers()


def new_id() -> str:
    """Return 26 characters: the time in milliseconds, then 80 bits (a monotonic ULID)."""
    number = _NUMBERS.next()
    digits = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
