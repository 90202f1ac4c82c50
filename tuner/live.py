"""A live display on a terminal, or plain lines where there is none."""

import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

_REFRESH_S = 0.05
_BAR_WIDTH = 28


class LiveDisplay:
    """What is shown on stderr, and disappears when it is closed.

    `enabled` None shows it on a terminal only; False never prints; True prints in any case, as
    plain lines where there is no terminal. It runs no thread.
    """

    def __init__(
        self,
        rendered: Callable[[], RenderableType],
        enabled: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self._rendered = rendered
        self._console = console or Console(stderr=True)
        self._enabled = self._console.is_terminal if enabled is None else enabled
        self._live: Live | None = None
        self._refreshed_s = 0.0

    def open(self) -> None:
        """Begin to draw on a terminal; a second call does nothing."""
        if self._enabled and self._console.is_terminal and self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def close(self) -> None:
        """Take the display off the terminal; a second call does nothing."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def print_line(self, line: Text) -> None:
        """Print a line where there is no terminal to draw on."""
        if self._enabled and not self._console.is_terminal:
            self._console.print(line, soft_wrap=True, highlight=False)

    def refresh(self, force: bool = False) -> None:
        """Draw what is to be shown now, unless that was done a moment ago."""
        if self._live is None:
            return
        now_s = time.monotonic()
        if force or now_s - self._refreshed_s >= _REFRESH_S:
            self._refreshed_s = now_s
            self._live.update(self._rendered(), refresh=True)


def bar(done: int, total: int | None) -> ProgressBar:
    """Return a bar of how far steps have come."""
    return ProgressBar(total=total or 1, completed=max(done, 0), width=_BAR_WIDTH)


def count(done: int, total: int | None) -> str:
    """Return how far steps have come as text, such as 3/10."""
    return f"{done}/{total}" if total else str(done)
