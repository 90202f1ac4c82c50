"""What fit() shows while it runs: phases, the last trial and the best so far."""

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuner.records import TrialRecord

_REFRESH_S = 0.05
_BAR_WIDTH = 28


class Progress:
    """A live display on stderr that disappears when it is closed.

    `enabled` None shows it on a terminal only; False never prints; True prints in any case, as
    plain lines where there is no terminal. It runs no thread, so that a fork in `eval_func`
    is safe. Use it as a context manager: it restores the terminal after an exception, too.
    """

    def __init__(
        self,
        enabled: bool | None = None,
        cost_name: str = "bops",
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._enabled = self._console.is_terminal if enabled is None else enabled
        self._cost_name = cost_name
        self._live: Live | None = None
        self._goal = ""
        self._phase: _Bar | None = None
        self._trials = _Bar("trials", None)
        self._lines: list[Text] = []
        self._refreshed_s = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, goal_text: str, max_trials: int | None) -> None:
        """Open the display with the goal; called again, it changes both."""
        self._goal = goal_text
        self._trials.total = max_trials
        if not self._enabled:
            return
        if not self._console.is_terminal:
            self._print(Text(f"goal: {goal_text}"))
        elif self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._refresh(force=True)

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase (recording, calibrating, sensitivity) of `total` steps, if known."""
        self._phase = _Bar(name, total)
        if not self._console.is_terminal:
            self._print(Text(name))
        self._refresh(force=True)

    def advance(self, steps: int = 1) -> None:
        """Count steps of the phase."""
        if self._phase is not None:
            self._phase.done += steps
        self._refresh()

    def trial(self, record: TrialRecord, best: TrialRecord, baseline: TrialRecord) -> None:
        """Show a trial that has ended, and the best so far."""
        self._phase = None
        self._trials.done = max(self._trials.done, record.number)
        self._lines = [
            self._describe(f"trial {record.number}", record, baseline),
            self._describe(f"best ({best.number})", best, baseline),
        ]
        if not self._console.is_terminal:
            self._print(self._lines[0])
        self._refresh(force=True)

    def close(self) -> None:
        """Take the display off the terminal; a second call does nothing."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _describe(self, title: str, record: TrialRecord, baseline: TrialRecord) -> Text:
        text = Text(f"{title:<10}")
        if record.state == "failed" or record.accuracy is None:
            text.append("failed  ", style="red")
            text.append((record.error or "").strip().rpartition("\n")[2])
            return text
        style = {True: "green", False: "yellow", None: ""}[record.meets_goal]
        mark = {True: "✓", False: "✗", None: " "}[record.meets_goal]
        text.append(f"accuracy {record.accuracy:.5g} {mark}  ", style=style)
        cost, full = record.costs.get(self._cost_name), baseline.costs.get(self._cost_name)
        if cost is not None and full:
            text.append(f"{self._cost_name} {cost / full:.2%} of FP32  ")
        text.append(f"{record.duration_s:.1f} s  {record.reason}")
        return text

    def _print(self, line: Text) -> None:
        if self._enabled:
            self._console.print(line, soft_wrap=True, highlight=False)

    def _refresh(self, force: bool = False) -> None:
        if self._live is None:
            return
        now_s = time.monotonic()
        if force or now_s - self._refreshed_s >= _REFRESH_S:
            self._refreshed_s = now_s
            self._live.update(self._rendered(), refresh=True)

    def _rendered(self) -> Group:
        bars = Table.grid(padding=(0, 1))
        for bar in (self._phase, self._trials):
            if bar is not None:
                bars.add_row(bar.name, bar.rendered(), bar.count())
        lines = [Text(f"goal: {self._goal}"), *self._lines]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(lines[0], bars, *lines[1:])


class _Bar:
    """A name and how far its steps have come."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = 0

    def rendered(self) -> ProgressBar:
        return ProgressBar(total=self.total or 1, completed=self.done, width=_BAR_WIDTH)

    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total else str(self.done)
