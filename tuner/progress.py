"""What fit() shows while it runs: phases, the last trial and the best so far."""

from types import TracebackType

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tuner.live import LiveDisplay, bar, count
from tuner.records import TrialRecord


class Progress:
    """A LiveDisplay of a search.

    It runs no thread, so that a fork in `eval_func` is safe. Use it as a context manager: it
    restores the terminal after an exception, too.
    """

    def __init__(
        self,
        enabled: bool | None = None,
        cost_name: str = "bops",
        console: Console | None = None,
    ) -> None:
        self._display = LiveDisplay(self._rendered, enabled, console)
        self._cost_name = cost_name
        self._goal = ""
        self._phase: _Steps | None = None
        self._trials = _Steps("trials", None)
        self._lines: list[Text] = []

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
        self._display.print_line(Text(f"goal: {goal_text}"))
        self._display.open()
        self._display.refresh(force=True)

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase (recording, calibrating, sensitivity) of `total` steps, if known."""
        self._phase = _Steps(name, total)
        self._display.print_line(Text(name))
        self._display.refresh(force=True)

    def advance(self, steps: int = 1) -> None:
        """Count steps of the phase."""
        if self._phase is not None:
            self._phase.done += steps
        self._display.refresh()

    def trial(self, record: TrialRecord, best: TrialRecord, baseline: TrialRecord) -> None:
        """Show a trial that has ended, and the best so far."""
        self._phase = None
        self._trials.done = max(self._trials.done, record.number)
        self._lines = [
            self._describe(f"trial {record.number}", record, baseline),
            self._describe(f"best ({best.number})", best, baseline),
        ]
        self._display.print_line(self._lines[0])
        self._display.refresh(force=True)

    def close(self) -> None:
        """Take the display off the terminal; a second call does nothing."""
        self._display.close()

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

    def _rendered(self) -> Group:
        bars = Table.grid(padding=(0, 1))
        for steps in (self._phase, self._trials):
            if steps is not None:
                shown = count(steps.done, steps.total)
                bars.add_row(steps.name, bar(steps.done, steps.total), shown)
        lines = [Text(f"goal: {self._goal}"), *self._lines]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(lines[0], bars, *lines[1:])


class _Steps:
    """A name and how far its steps have come."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = 0
