"""The command line, run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.cli import parse_goal
from tuner.errors import TunerError

_TASK = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
x = torch.randn(64, 8)
labels = net(x).argmax(-1)
constant = 3


def task():
    return net, [x], lambda model: (model(x).argmax(-1) == labels).float().mean()


def wrong():
    return net


def impossible():
    scores = iter([1.0] + [0.0] * 99)
    return net, [x], lambda model: next(scores)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mytask.py").write_text(_TASK)
    return tmp_path


def tuner(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder."""
    command = Path(sys.executable).with_name("tuner")
    return subprocess.run(
        [str(command), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=os.environ | {"COLUMNS": "120"},
    )


def test_fit_save_show(folder: Path) -> None:
    done = tuner(folder, "fit", "mytask:task", "--goal", "5%", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "uniform W8A8" in done.stdout
    assert done.stderr == ""
    assert (folder / "out" / "report.html").exists()
    shown = tuner(folder, "show", "out")
    assert shown.returncode == 0, shown.stderr
    for word in ("Linear", "16x8", "W8A8", "predicted damage", "share of cost"):
        assert word in shown.stdout


def test_a_missed_goal_shows_in_the_exit_code(folder: Path) -> None:
    done = tuner(folder, "fit", "mytask:impossible", "--at-least", "2")
    assert done.returncode == 1
    assert "missed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "mytask"], "names no function"),
        (["fit", "nosuch:task"], "no module 'nosuch'"),
        (["fit", "mytask:tusk"], "it has impossible, task, wrong"),
        (["fit", "mytask:constant"], "no function 'constant'"),
        (["fit", "mytask:wrong"], "returned a Sequential"),
        (["fit", "mytask:task", "--goal", "lots"], "give 1%"),
        (["fit", "mytask:task", "--space", "int9"], "int8"),
        (["fit", "mytask:task", "--space", "fp8"], "float formats"),
        (["fit", "mytask:task", "--strategy", "autos"], "auto"),
        (["fit", "mytask:task", "--timeout", "0"], "leaves no time"),
        (["fit", "mytask:task", "--storage", "mysql://x"], "not known"),
        (["show", "nothing"], "QuantizedModel.save"),
    ],
)
def test_mistakes_are_said_without_a_traceback(
    folder: Path, arguments: list[str], says: str
) -> None:
    done = tuner(folder, *arguments)
    assert done.returncode == 2
    assert says in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_goals() -> None:
    assert (parse_goal("1%").max_drop, parse_goal("1 %").relative) == (0.01, True)
    assert (parse_goal("0.02").max_drop, parse_goal("0.02").relative) == (0.02, False)
    with pytest.raises(TunerError, match="lots"):
        parse_goal("lots")
