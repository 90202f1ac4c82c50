"""What fit_qat() shows while it runs: the epoch, its batches, and the last results."""

from types import TracebackType

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tuner.live import LiveDisplay, bar, count


class TrainingProgress:
    """A LiveDisplay of a training; use it as a context manager."""

    def __init__(
        self, epochs: int, enabled: bool | None = None, console: Console | None = None
    ) -> None:
        self._display = LiveDisplay(self._rendered, enabled, console)
        self._epochs = epochs
        self._epoch = 0
        self._done, self._total = 0, 0
        self._line = Text("")

    def __enter__(self) -> "TrainingProgress":
        self._display.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.close()

    def epoch(self, number: int, batches: int | None) -> None:
        """Begin an epoch of so many batches, if that is known."""
        self._epoch, self._done, self._total = number, 0, batches or 0
        self._display.refresh(force=True)

    def advance(self) -> None:
        """Count a batch."""
        self._done += 1
        self._display.refresh()

    def result(self, text: str) -> None:
        """Show what an epoch, or the evaluation before the first, gave."""
        self._line = Text(text)
        self._display.print_line(self._line)
        self._display.refresh(force=True)

    def _rendered(self) -> Group:
        bars = Table.grid(padding=(0, 1))
        epochs = bar(self._epoch - 1, self._epochs)
        bars.add_row("epochs", epochs, f"{self._epoch}/{self._epochs}")
        bars.add_row("batches", bar(self._done, self._total), count(self._done, self._total))
        return Group(bars, self._line)
