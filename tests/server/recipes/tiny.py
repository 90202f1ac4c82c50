"""A recipe whose evaluations leave marks in a folder, and misbehave where a test asks for it."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tuner.recipes import Parameters, Recipe, Task
from tuner.recipes.digits import digits

_PATIENCE_S = 120.0
_STEPS = 30
_BLOCK_BYTES = 64 << 20


class TinyParameters(Parameters):
    """Where marks are left, and what happens at which evaluation, up to so many times."""

    folder: Path
    behaviour: Literal["none", "raise", "quit", "die", "eat", "hold", "lower"] = "none"
    at: int = 0
    times: int = 1
    seeded: bool = True


def marks(folder: Path, name: str) -> int:
    """Return how often something was marked."""
    path = folder / name
    return len(path.read_bytes()) if path.exists() else 0


def _mark(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b".")


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on digits picked at random, with all three generators; then a mark."""

    parameters: TinyParameters

    def __call__(self, model: nn.Module) -> float:
        """Return the share of hits, or of errors."""
        folder, data = self.parameters.folder, digits()
        self._misbehave()
        count = len(data.test_labels) - random.randrange(20)
        picked = torch.randperm(len(data.test_labels))[np.random.permutation(count)]
        with torch.no_grad():
            hits = model(data.test_images[picked]).argmax(-1) == data.test_labels[picked]
        _mark(folder, "evaluated")
        share = hits.float().mean().item()
        return 1 - share if self.parameters.behaviour == "lower" else share

    def _misbehave(self) -> None:
        folder, behaviour = self.parameters.folder, self.parameters.behaviour
        act = _ACTS.get(behaviour)
        if act is None or marks(folder, "evaluated") < self.parameters.at:
            return
        if marks(folder, "acted") < self.parameters.times:
            _mark(folder, "acted")
            act(folder)


def _raise(folder: Path) -> None:
    raise ValueError(f"no score today \0 {folder.name}")


def _quit(folder: Path) -> None:
    sys.exit(0)


def _die(folder: Path) -> None:
    print("about to die", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _eat(folder: Path) -> None:
    kept = []
    while True:
        kept.append(b"x" * _BLOCK_BYTES)
        time.sleep(0.02)


def _hold(folder: Path) -> None:
    """Wait, in short batches, until the test lets it go on."""
    until = time.monotonic() + _PATIENCE_S
    while not (folder / "go").exists() and time.monotonic() < until:
        time.sleep(0.02)


_ACTS: dict[str, Callable[[Path], None]] = {
    "raise": _raise,
    "quit": _quit,
    "die": _die,
    "eat": _eat,
    "hold": _hold,
}


def _trained(parameters: TinyParameters) -> nn.Module:
    data = digits()
    if parameters.seeded:
        torch.manual_seed(0)
    else:
        torch.seed()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images), data.train_labels).backward()
        optimizer.step()
    return model


def _build(parameters: TinyParameters) -> Task:
    parameters.folder.mkdir(parents=True, exist_ok=True)
    return Task(
        model=_trained(parameters),
        calib_dataloader=digits().train_images[:128].split(64),
        eval_func=Evaluation(parameters),
        description="digits",
        higher_is_better=parameters.behaviour != "lower",
    )


RECIPE = Recipe("tiny", "Two linear layers on digits", TinyParameters, _build)
