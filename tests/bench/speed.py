"""What a plan costs in time while searching: an evaluation under int8, and a switch of plans."""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import machine
import tables
from models import MODELS

from tuner import OpConfig, TuningConfig
from tuner.isolation import copied
from tuner.preparation import Preparation, Prepared
from tuner.progress import Progress
from tuner.recipes import Task

_SPACE = "mixed-int"
_INT8, _OTHER = "W8A8", "W4A6"


@dataclass(frozen=True)
class Speed:
    """Medians of interleaved repeats, in seconds.

    A switch goes from all-int8 to a plan that differs in every op with a weight. `cold_switch_s` is
    the first one, which quantizes the weights; `switch_s` a later one, which finds them cached.
    """

    model: str
    repeats: int
    float_s: float
    int8_s: float
    cold_switch_s: float
    switch_s: float
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of JSON."""
        return asdict(self)


def measure(name: str, task: Task, repeats: int) -> Speed:
    """Measure one model."""
    surroundings = machine.describe()
    prepared = _prepared(task)
    int8, other = _uniform(prepared, _INT8), _uniform(prepared, _OTHER)
    prepared.model.apply(int8)
    cold_switch_s = _seconds(lambda: prepared.model.apply(other))
    switches = []
    for _ in range(10):
        prepared.model.apply(int8)
        switches.append(_seconds(lambda: prepared.model.apply(other)))
    prepared.model.apply(int8)
    pairs = [
        (
            _seconds(lambda: task.eval_func(task.model)),
            _seconds(lambda: task.eval_func(prepared.model.model)),
        )
        for _ in range(repeats + 1)
    ][1:]
    return Speed(
        model=name,
        repeats=repeats,
        float_s=median(a for a, _ in pairs),
        int8_s=median(b for _, b in pairs),
        cold_switch_s=cold_switch_s,
        switch_s=median(switches),
        machine=surroundings,
    )


def _prepared(task: Task) -> Prepared:
    config = TuningConfig(space=_SPACE)
    preparation = Preparation(copied(task.model), task.calib_dataloader, None, config)
    preparation.record()
    with Progress(False, config.cost_name) as silent:
        return preparation.finish(silent)


def _uniform(prepared: Prepared, label: str) -> Mapping[str, OpConfig]:
    """Return the plan in which every unit that has an option of this label takes it."""
    units = prepared.space.space.units
    return prepared.space.plan(tuple(unit.index_of(label) or 0 for unit in units))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measure what the arguments ask for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.models:
        row = measure(name, MODELS[name](), arguments.repeats).to_dict()
        tables.append(row, tables.SPEED)
        print(f"{name}: int8 {row['int8_s'] / row['float_s']:.2f} × FP32", flush=True)
    tables.render()


if __name__ == "__main__":
    main()
