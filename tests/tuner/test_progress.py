"""Progress: shows what happens, prints nothing when silent, leaves the terminal clean."""

import io
import re

import pytest
from rich.console import Console

from tuner.plan import Plan
from tuner.progress import Progress
from tuner.records import TrialRecord
from tuner.schemes import OpConfig

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def _record(number: int, accuracy: float | None, bops: float, met: bool | None) -> TrialRecord:
    return TrialRecord(
        number=number,
        plan=Plan({"fc": OpConfig.float()}),
        accuracy=accuracy,
        metrics={},
        costs={"bops": bops, "size_bytes": 10.0},
        meets_goal=met,
        state="complete" if accuracy is not None else "failed",
        duration_s=1.25,
        reason="uniform [W4A8]",
        error=None if accuracy is not None else "Traceback\nRuntimeError: boom [x]",
    )


BASELINE = _record(0, 0.99, 100.0, True)
TRIAL = _record(3, 0.985, 6.25, True)


def _console(terminal: bool, width: int = 120) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=width, color_system=None), stream


def _run(progress: Progress) -> None:
    progress.start("accuracy ≥ 0.98", 10)
    progress.phase("calibrating", 4)
    progress.advance(3)
    progress.trial(TRIAL, TRIAL, BASELINE)


def _interrupt(console: Console) -> None:
    with Progress(console=console) as progress:
        _run(progress)
        raise KeyboardInterrupt


@pytest.mark.parametrize(("terminal", "enabled"), [(False, None), (False, False), (True, False)])
def test_silent_prints_nothing(terminal: bool, enabled: bool | None) -> None:
    console, stream = _console(terminal)
    with Progress(enabled, console=console) as progress:
        _run(progress)
    assert stream.getvalue() == ""


def test_nothing_goes_to_the_standard_streams_when_silent(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Progress(None) as progress:
        _run(progress)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_goal_phase_trial_cost_and_best() -> None:
    console, stream = _console(terminal=True)
    with Progress(console=console) as progress:
        _run(progress)
        failed = _record(4, None, 3.0, None)
        progress.trial(failed, TRIAL, BASELINE)
    shown = stream.getvalue()
    for part in ("goal: accuracy ≥ 0.98", "calibrating", "0/4", "3/10", "trial 3", "0.985 ✓"):
        assert part in shown
    assert "bops 6.25% of FP32" in shown
    assert "best (3)" in shown
    assert re.search(r"trial 4\s+failed\s+RuntimeError: boom \[x\]", shown)


def test_forced_without_a_terminal_prints_plain_lines() -> None:
    console, stream = _console(terminal=False)
    with Progress(True, console=console) as progress:
        _run(progress)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["goal: accuracy ≥ 0.98", "calibrating"]
    assert lines[2].startswith(
        "trial 3   accuracy 0.985 ✓  bops 6.25% of FP32  1.2 s  uniform [W4A8]"
    )
    assert "\x1b" not in stream.getvalue()


def test_an_exception_leaves_the_terminal_clean() -> None:
    console, stream = _console(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        _interrupt(console)
    shown = stream.getvalue()
    assert shown.count(HIDE) == shown.count(SHOW) == 1
    # The display's three lines are erased after the cursor is shown again.
    assert shown[shown.rindex(SHOW) :].count("\x1b[2K") >= 3


def test_close_twice_and_without_start() -> None:
    console, stream = _console(terminal=True)
    progress = Progress(console=console)
    progress.close()
    assert stream.getvalue() == ""
    _run(progress)
    progress.close()
    length = len(stream.getvalue())
    progress.close()
    assert len(stream.getvalue()) == length


def test_a_narrow_terminal_keeps_to_its_width() -> None:
    console, stream = _console(terminal=True, width=40)
    with Progress(console=console) as progress:
        _run(progress)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 40


def test_another_cost_is_shown_for_another_objective() -> None:
    console, stream = _console(terminal=True)
    with Progress(cost_name="size_bytes", console=console) as progress:
        _run(progress)
    assert "size_bytes 100.00% of FP32" in stream.getvalue()
