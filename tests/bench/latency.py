"""Latency as the objective: what a search takes, what it predicts, and how fast its plan is.

Models are tuned with `objective="latency"` for a runtime (1 % goal), from empty caches. Those
with random weights, as ResNet-18, are quantized by calibration alone. What comes back is exported,
and timed by the export at batch 1: that is the check from outside.
"""

import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import machine
import tables
from export_models import RANDOM, arguments_of, random_inputs
from models import MODELS
from scipy.stats import spearmanr

from tuner import NothingQuantizedWarning, QuantizedModel, TrialRecord, TuningConfig, quantization
from tuner.latency import LatencyModel
from tuner.op_times import OpTimes

_TRIALS = 12
_LEAST_RANKED = 4


class Stopwatch:
    """Counts calls of methods, and the seconds that they take; `made` is the last LatencyModel."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.made: LatencyModel | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all that is timed for `objective="latency"`."""
        kinds = (
            ("fp32", LatencyModel, "__init__"),
            ("plans", LatencyModel, "measure"),
            ("ops", OpTimes, "_measured"),
        )
        with ExitStack() as stack:
            for name, owner, method in kinds:
                watched = self._watched(name, getattr(owner, method))
                stack.enter_context(patch.object(owner, method, watched))
            yield

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(owner: Any, *arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(owner, *arguments)
            finally:
                self.seconds[name] += time.perf_counter() - started
                self.calls[name] += 1
                if isinstance(owner, LatencyModel):
                    self.made = owner

        return call


def tuned(name: str, config: TuningConfig) -> tuple[QuantizedModel, list[str]]:
    """Return a model tuned for latency, and what the tuner warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NothingQuantizedWarning)
        if name in RANDOM:
            inputs = random_inputs(name, seed=0)
            found = quantization.fit(RANDOM[name](), [inputs], config=config, progress=False)
        else:
            task = MODELS[name]()
            found = quantization.fit(
                task.model, task.calib_dataloader, task.eval_func, config, progress=False
            )
    told = [w for w in caught if issubclass(w.category, NothingQuantizedWarning)]
    return found, [str(warning.message) for warning in told]


def row(name: str, space: str, target: str, trials: int) -> dict[str, Any]:
    """Return the raw line of one search."""
    surroundings = machine.describe()
    watch = Stopwatch()
    config = TuningConfig(space=space, target=target, objective="latency", max_trials=trials)
    with watch.watching():
        model, told = tuned(name, config)
    calls, seconds = dict(watch.calls), dict(watch.seconds)
    assert watch.made is not None
    latency, result, best = watch.made, model.result, model.result.best
    exported = _exported(model, target)
    model._parts.model.apply({})  # ops are timed alone without a plan
    records = [_trial(record, latency) for record in result.trials]
    measured = result.baseline_costs["latency_ms"] / best.costs["latency_ms"]
    predicted = result.baseline_costs["latency_ms"] / latency.predicted_ms(best.plan)
    return {
        "model": name,
        "space": space,
        "target": target,
        "evaluations": result.evaluations,
        "plans_measured": calls.get("plans", 0),
        "ops_timed": calls.get("ops", 0),
        "wall_s": result.duration_s,
        "eval_s": result.eval_s,
        "timing_s": seconds,
        "baseline_costs": dict(result.baseline_costs),
        "best_costs": dict(best.costs),
        "best_trial": best.number,
        "speedup": measured,
        "predicted_speedup": predicted,
        "rank_correlation": _correlation(records),
        "simulated": best.accuracy,
        "float": result.baseline,
        "goal": result.goal.describe(result.baseline) if result.baseline is not None else None,
        "goal_met": result.goal_met,
        "stop_reason": result.stop_reason,
        "quantized_ops": result.quantized_ops,
        "ops": len(best.plan),
        "exported": exported,
        "warnings": told,
        "trials": records,
        "machine": surroundings,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _trial(record: TrialRecord, latency: LatencyModel) -> dict[str, Any]:
    return {
        "number": record.number,
        "accuracy": record.accuracy,
        "meets_goal": record.meets_goal,
        "predicted_ms": latency.predicted_ms(record.plan),
        "costs": dict(record.costs),
        "reason": record.reason,
    }


def _correlation(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return Spearman's rank correlation of predicted and measured times; None of fewer than 4."""
    known = [r for r in records if "latency_ms" in r["costs"]]
    predicted = [r["predicted_ms"] for r in known]
    measured = [r["costs"]["latency_ms"] for r in known]
    if len(known) < _LEAST_RANKED or len(set(predicted)) < 2:
        return None
    return float(spearmanr(predicted, measured).statistic)


def _exported(model: QuantizedModel, target: str) -> dict[str, Any] | None:
    """Return the latency entry of an export's report, None where FP32 came back."""
    if not model.result.quantized_ops:
        return None
    with tempfile.TemporaryDirectory() as folder:
        report = model.export(Path(folder) / "model", target=target, batches=(1,))
    entry: dict[str, Any] = report.to_dict()["latency"][0]
    return entry


def main() -> None:
    """Measure what the arguments ask for, and write the table."""
    arguments = arguments_of(__doc__, MODELS, _TRIALS)
    for name in arguments.models:
        for target in arguments.targets:
            with tempfile.TemporaryDirectory() as folder, fresh_caches(Path(folder)):
                measured = row(name, arguments.space, target, arguments.trials)
            tables.append(measured, tables.LATENCY)
            print(
                name, target, f"{measured['wall_s']:.0f} s, {measured['speedup']:.2f}", flush=True
            )
    tables.render()


def fresh_caches(folder: Path) -> AbstractContextManager[Any]:
    """Let the times of ops, and what PyTorch compiles, be kept in a folder of their own."""
    caches = {"XDG_CACHE_HOME": folder / "times", "TORCHINDUCTOR_CACHE_DIR": folder / "compiled"}
    return patch.dict(os.environ, {name: str(path) for name, path in caches.items()})


if __name__ == "__main__":
    main()
