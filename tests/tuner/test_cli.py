"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from tuner import recipes
from tuner.cli import parse_goal, sweep
from tuner.errors import TunerError
from tuner.sweep import SweepResult

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


def tuner(
    folder: Path, *arguments: str, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder."""
    command = Path(sys.executable).with_name("tuner")
    return subprocess.run(
        [str(command), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
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


def test_repairs_can_be_left_out(folder: Path) -> None:
    common = ("fit", "mytask:task", "--space", "int4-weight-only", "--goal", "90%")
    repaired, plain = tuner(folder, *common), tuner(folder, *common, "--no-repairs")
    assert repaired.returncode == plain.returncode == 0, plain.stderr
    assert "gptq" in repaired.stdout
    assert "gptq" not in plain.stdout


def test_a_missed_goal_shows_in_the_exit_code(folder: Path) -> None:
    done = tuner(folder, "fit", "mytask:impossible", "--at-least", "2")
    assert done.returncode == 1
    assert "missed" in done.stdout


def test_sweep_prints_a_table_and_writes_it_down(folder: Path) -> None:
    formats = ("--formats", "int8, mxfp4,int2", "--part", "weights", "--part", "both")
    done = tuner(folder, "sweep", "mytask:task", *formats, "--out", "out/swept")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["format", "bits", "weights", "both"]
    assert [line[:2] for line in lines[1:5]] == [
        ["FP32", "32"],
        ["int8", "8"],
        ["mxfp4", "4"],
        ["int2", "2"],
    ]
    result = SweepResult.from_dict(json.loads((folder / "out/swept/sweep.json").read_text()))
    assert [row.part for row in result.rows] == ["weights", "both"] * 3
    table = pd.read_csv(folder / "out/swept/sweep.csv")
    assert table["accuracy"].tolist() == [row.accuracy for row in result.rows]
    assert (folder / "out/swept/sweep.svg").read_text().startswith("<svg")


def test_sweep_without_a_function_takes_a_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = SimpleNamespace(
        description="a small task",
        model=nn.Linear(4, 2),
        calib_dataloader=[torch.ones(2, 4)],
        eval_func=lambda model: 1.0,
    )
    monkeypatch.setattr(recipes, "get", lambda name: SimpleNamespace(task=lambda: task))
    sweep(formats="int8")
    shown = capsys.readouterr().out
    assert "digits-resnet" in shown
    assert "a small task" in shown
    assert "int8    8     1 (+0.0 %)  1 (+0.0 %)  1 (+0.0 %)" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "mytask"], "names no function"),
        (["fit", ":task"], "names no function"),
        (["fit", "mytask:"], "names no function"),
        (["fit", ".mytask:task"], "names no function"),
        (["sweep", "my..task:task"], "names no function"),
        (["fit", "mytask.sub:task"], "no module 'mytask.sub'"),
        (["fit", "nosuch:task"], "no module 'nosuch'"),
        (["fit", "mytask:tusk"], "it has impossible, task, wrong"),
        (["fit", "mytask:constant"], "no function 'constant'"),
        (["fit", "mytask:wrong"], "returned a Sequential"),
        (["fit", "mytask:task", "--goal", "lots"], "give 1%"),
        (["fit", "mytask:task", "--space", "int9"], "int8"),
        (["fit", "mytask:task", "--strategy", "autos"], "auto"),
        (["fit", "mytask:task", "--timeout", "0"], "leaves no time"),
        (["fit", "mytask:task", "--storage", "mysql://x"], "not known"),
        (["show", "nothing"], "QuantizedModel.save"),
        (["sweep", "mytask:wrong"], "returned a Sequential"),
        (["sweep", "mytask:task", "--formats", "int8,int88"], "unknown format 'int88'"),
        (["sweep", "mytask:task", "--formats", ","], "formats is empty"),
        (["sweep", "mytask:task", "--part", "weight"], "'weights', 'inputs', 'both'"),
        (["sweep", "--recipe", "digit-resnet"], "Did you mean digits-resnet"),
        (["sweep", "mytask:task", "--formats", "int8", "--out", "mytask.py"], "cannot be made"),
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
