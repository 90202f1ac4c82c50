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
from torch import nn

from tuner import OpConfig, PerChannel, TensorScheme, TuningConfig, formats, quantization
from tuner.allocator import keep_freed_memory
from tuner.isolation import copied
from tuner.preparation import Preparation, Prepared
from tuner.progress import Progress
from tuner.recipes import Task

_SPACE = "mixed-int"
_INT8, _OTHER = "W8A8", "W4A6"
FORMATS = ("int8", "int4", "e4m3fn", "mxfp4")


@dataclass(frozen=True)
class Speed:
    """Medians of interleaved repeats, in seconds.

    `float_s` and `int8_s` are evaluations of the plain model and of a plan that fit() made;
    `formats_s` are those of whole-model simulations, by format. A switch goes from all-int8 to a
    plan that differs in every op with a weight: `cold_switch_s` is the first one, which quantizes
    the weights; `switch_s` a later one, which finds them cached.
    """

    model: str
    repeats: int
    float_s: float
    int8_s: float
    cold_switch_s: float
    switch_s: float
    formats_s: dict[str, float]
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
    models = {"float": task.model, "plan": prepared.model.model, **_simulations(task)}
    rounds = [
        {name: _seconds(lambda m=model: task.eval_func(m)) for name, model in models.items()}
        for _ in range(repeats + 1)
    ][1:]
    medians = {name: median(seconds[name] for seconds in rounds) for name in models}
    return Speed(
        model=name,
        repeats=repeats,
        float_s=medians.pop("float"),
        int8_s=medians.pop("plan"),
        cold_switch_s=cold_switch_s,
        switch_s=median(switches),
        formats_s=medians,
        machine=surroundings,
    )


def _simulations(task: Task) -> dict[str, nn.Module]:
    """Return the model with one format on all weights and inputs; static but for MX."""
    batches = list(task.calib_dataloader)
    return {
        name: quantization.simulate(
            task.model,
            inputs=TensorScheme(format=name),
            weights=_weights(name),
            calib_dataloader=batches,
        )
        for name in FORMATS
    }


def _weights(name: str) -> TensorScheme:
    block = formats.get(name).block
    return (
        TensorScheme(format=name) if block else TensorScheme(format=name, granularity=PerChannel())
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
    keep_freed_memory()  # as the command line and the service do; FP32 gains more than the others
    for name in arguments.models:
        row = measure(name, MODELS[name](), arguments.repeats).to_dict()
        tables.append(row, tables.SPEED)
        print(f"{name}: int8 {row['int8_s'] / row['float_s']:.2f} × FP32", flush=True)
    tables.render()


if __name__ == "__main__":
    main()
