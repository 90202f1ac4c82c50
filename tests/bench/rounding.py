"""What weights alone at few bits cost in accuracy, by how they are rounded: `--models minilm`.

Seconds are those of the processor, of all threads together, for all weights of the model.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import machine
import tables
import torch
from models import MODELS
from torch import Tensor, nn

from tuner import PerChannel, TensorScheme, fake_quantize
from tuner.batches import Feeder
from tuner.isolation import copied
from tuner.model import InstrumentedModel
from tuner.ops import Op, WeightRef
from tuner.recipes import Task
from tuner.recovery.adaround import adaround
from tuner.recovery.gptq import gptq
from tuner.recovery.moments import InputMoments, moments_for
from tuner.recovery.rounding_rows import supports
from tuner.sites import Call, Site

_COLUMNS = ("nearest", "gptq", "quantease", "adaround")
Weights = dict[str, Tensor]
"""Op → its rounded weight."""


@dataclass(eq=False)
class MomentsTap:
    """Keeps the input moments of every op that has one weight of its own."""

    refs: Mapping[str, WeightRef]
    calls: int
    moments: dict[str, InputMoments] = field(default_factory=dict)

    def run(self, site: Site, call: Call) -> Any:
        operands: dict[int, Tensor] = {}

        def look(index: int, x: Tensor) -> Tensor:
            operands[index] = x
            return x

        output = call.invoke(look)
        if site.name in self.refs and supports(call.family):
            self._update(site.name, call, operands)
        return output

    def other(self, scope: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    def _update(self, name: str, call: Call, operands: Mapping[int, Tensor]) -> None:
        ref = self.refs[name]
        x = operands[1 if ref.operand == 0 else 0]
        if name not in self.moments:
            made = moments_for(call, ref, x, expected_calls=self.calls)
            if made is None:
                return
            self.moments[name] = made
        self.moments[name].update(call, x)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the weights that are rounded, and the moments of what they multiply."""

    model: nn.Module
    refs: Mapping[str, WeightRef]
    weights: Weights
    moments: Mapping[str, Tensor]

    def scheme(self, op: str, bits: int) -> TensorScheme:
        granularity = PerChannel(self.refs[op].axis)
        return TensorScheme(format=f"int{bits}", granularity=granularity, calibration="mse")

    def put(self, weights: Weights) -> None:
        for op, weight in weights.items():
            ref = self.refs[op]
            ref.of(self.model.get_parameter(ref.path).data).copy_(weight)


def subject(task: Task) -> Subject:
    """Collect the moments in one pass over the calibration data."""
    model = copied(task.model)
    batches = list(task.calib_dataloader)
    feed, instrumented = Feeder(model), InstrumentedModel(model)
    graph = instrumented.record(lambda: feed(model, batches[0]), 1)
    tap = MomentsTap(_own_weights(graph.ops), len(batches))
    with torch.no_grad(), instrumented.watching(tap):
        for batch in batches:
            feed(model, batch)
    refs = {op: tap.refs[op] for op in tap.moments}
    kept = {op: r.of(model.get_parameter(r.path)).detach().clone() for op, r in refs.items()}
    seconds = {op: m.second for op, m in tap.moments.items() if m.second is not None}
    return Subject(model, refs, kept, seconds)


def _own_weights(ops: Mapping[str, Op]) -> dict[str, WeightRef]:
    """Return the weights that no other op uses: an embedding that is the head, too, stays float."""
    uses = Counter(ref.path for op in ops.values() for ref in op.weights)
    single = {name: op.weights[0] for name, op in ops.items() if len(op.weights) == 1}
    return {n: r for n, r in single.items() if uses[r.path] == 1 or r.rows is not None}


def by_nearest(s: Subject, bits: int) -> Weights:
    return {op: fake_quantize(w, s.scheme(op, bits)) for op, w in s.weights.items()}


def by_gptq(s: Subject, bits: int) -> Weights:
    return {
        op: gptq(w, s.moments[op], s.scheme(op, bits), axis=s.refs[op].axis)[0]
        for op, w in s.weights.items()
    }


def by_descent(s: Subject, bits: int) -> Weights:
    return by_adaround(s, bits, steps=0)


def by_adaround(s: Subject, bits: int, **options: Any) -> Weights:
    return {
        op: adaround(w, s.moments[op], s.scheme(op, bits), axis=s.refs[op].axis, **options)[0]
        for op, w in s.weights.items()
    }


_WAYS = dict(zip(_COLUMNS, (by_nearest, by_gptq, by_descent, by_adaround), strict=True))


def rows(name: str, all_bits: list[int], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a raw line for each width."""
    task = MODELS[name]()
    baseline = task.eval_func(task.model)
    s = subject(task)
    for bits in all_bits:
        accuracies, seconds = {}, {}
        for column in columns:
            started = time.process_time()
            s.put(_WAYS[column](s, bits))
            seconds[column] = time.process_time() - started
            accuracies[column] = task.eval_func(s.model)
        yield {
            "model": name,
            "bits": bits,
            "baseline": baseline,
            "accuracies": accuracies,
            "seconds": seconds,
            "machine": machine.describe(),
        }


def main() -> None:
    """Measure what the arguments ask for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--ways", nargs="+", choices=_COLUMNS, default=list(_COLUMNS))
    arguments = parser.parse_args()
    for name in arguments.models:
        for row in rows(name, arguments.bits, arguments.ways):
            tables.append(row, tables.ROUNDING)
            print(name, f"W{row['bits']}", row["accuracies"], flush=True)
    tables.render()


if __name__ == "__main__":
    main()
