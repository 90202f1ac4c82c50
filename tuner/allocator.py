"""Freed memory that stays with the process, for processes that do nothing but evaluate models.

glibc gives large blocks back to the system as soon as they are freed, and gets them anew, a page at
a time, for the next tensor: half the time of a small CNN's evaluation.
"""

import ctypes
import logging

_log = logging.getLogger(__name__)

# of <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20  # glibc takes no more
_NEVER = 2**31 - 1


class Malloc:
    """What is known of the C library's allocator in this process."""

    kept_bytes = 0
    """Freed blocks of up to so many bytes stay with the process; 0 where nothing was changed."""


def keep_freed_memory() -> bool:
    """Let glibc keep blocks of up to 32 MiB that are freed, for the rest of the process.

    Its memory then stays what it was at most. Returns False where the C library is another one.
    Libraries should leave this to the program that they are part of.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        _log.debug("the C library has no mallopt: freed memory goes back to the system")
        return False
    changed = ((_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, _NEVER))
    are_kept = all([mallopt(name, value) == 1 for name, value in changed])
    Malloc.kept_bytes = _LARGEST_KEPT if are_kept else 0
    return are_kept
