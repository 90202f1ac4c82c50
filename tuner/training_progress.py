"""What fit_qat() shows while it runs: the epoch, its batches, and the last results."""

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESH_S = 0.05
_BAR_WIDTH = 28


class TrainingProgress:
    """A live display on stderr that disappears when it is closed.

    `enabled` None shows it on a terminal only; False never prints; True prints in any case, as
    plain lines where there is no terminal. It runs no thread. Use it as a context manager.
    """

    def __init__(
        self, epochs: int, enabled: bool | None = None, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True)
        self._enabled = self._console.is_terminal if enabled is None else enabled
        self._live: Live | None = None
        self._epochs = epochs
        self._epoch = 0
        self._done, self._total = 0, 0
        self._line = Text("")
        self._refreshed_s = 0.0

    def __enter__(self) -> "TrainingProgress":
        if self._enabled and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def epoch(self, number: int, batches: int | None) -> None:
        """Begin an epoch of so many batches, if that is known."""
        self._epoch, self._done, self._total = number, 0, batches or 0
        self._refresh(force=True)

    def advance(self) -> None:
        """Count a batch."""
        self._done += 1
        self._refresh()

    def result(self, text: str) -> None:
        """Show what an epoch, or the evaluation before the first, gave."""
        self._line = Text(text)
        if self._enabled and not self._console.is_terminal:
            self._console.print(self._line, soft_wrap=True, highlight=False)
        self._refresh(force=True)

    def _refresh(self, force: bool = False) -> None:
        if self._live is None:
            return
        now_s = time.monotonic()
        if force or now_s - self._refreshed_s >= _REFRESH_S:
            self._refreshed_s = now_s
            self._live.update(self._rendered(), refresh=True)

    def _rendered(self) -> Group:
        bars = Table.grid(padding=(0, 1))
        bars.add_row("epochs", _bar(self._epoch - 1, self._epochs), f"{self._epoch}/{self._epochs}")
        count = f"{self._done}/{self._total}" if self._total else str(self._done)
        bars.add_row("batches", _bar(self._done, self._total), count)
        return Group(bars, self._line)


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=total or 1, completed=max(done, 0), width=_BAR_WIDTH)
