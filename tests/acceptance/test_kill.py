"""kill -9 in the middle of a trial, then the same command again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, os, signal, sys
import torch
from tuner import TuningConfig, quantization

storage, kill_at = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
x = torch.randn(256, 8)
labels = net(x).argmax(-1)
calls = 0

def eval_func(model):
    global calls
    calls += 1
    score = (model(x).argmax(-1) == labels).float().mean()
    if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return score

config = TuningConfig(space="mixed-int", max_trials=8)
result = quantization.fit(net, [x], eval_func, config, storage=storage, study_name="s").result
plans = [trial.plan.digest for trial in result.trials]
print(json.dumps([calls, result.best.number, result.best.plan.digest, plans]))
"""


def _run(storage: str, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, storage, str(kill_at)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
    )


@pytest.mark.parametrize("kill_at", [1, 4])
def test_goes_on_at_the_trial_that_was_killed(kill_at: int, tmp_path: Path) -> None:
    whole = _run(f"sqlite:///{tmp_path}/whole.db")
    assert whole.returncode == 0, whole.stderr
    storage = f"sqlite:///{tmp_path}/killed.db"
    assert _run(storage, kill_at).returncode == -signal.SIGKILL
    resumed = _run(storage)
    assert resumed.returncode == 0, resumed.stderr
    calls, *search = json.loads(whole.stdout)
    calls_again, *search_again = json.loads(resumed.stdout)
    assert search_again == search
    assert calls_again == calls - (kill_at - 1)
