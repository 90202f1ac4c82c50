"""What `eval_func` may return, read strictly."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tuner.errors import EvaluationError

_ALLOWED = (
    "a number (float, numpy scalar, 0-d tensor), a mapping of metric names to numbers, or a 1-d "
    "array of per-sample scores"
)


@dataclass(frozen=True)
class Score:
    """One evaluation: the number that counts, all metrics, and per-sample scores if given."""

    accuracy: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[float, ...] | None = None


def read_score(value: Any, metric: str | None) -> Score:
    """Read what `eval_func` returned; raises EvaluationError unless it is one of the allowed kinds.

    Of a mapping, `metric` names the number that counts (it may be None if there is only one).
    """
    if isinstance(value, Mapping):
        return _from_mapping(value, metric)
    if metric is not None:
        raise EvaluationError(
            f"the goal's metric is {metric!r}, but eval_func returned {_shown(value)}: return a "
            "mapping of metrics, or leave AccuracyGoal(metric=…) out"
        )
    number = _number(value)
    if number is not None:
        return Score(_finite(number))
    samples = _samples(value)
    if samples is None:
        raise EvaluationError(f"eval_func returned {_shown(value)}: it must return {_ALLOWED}")
    if not len(samples):
        raise EvaluationError("eval_func returned an empty array: it scored no sample")
    return Score(_finite(float(samples.mean())), {}, tuple(samples.tolist()))


def _from_mapping(value: Mapping[Any, Any], metric: str | None) -> Score:
    metrics = {}
    for name, item in value.items():
        number = _number(item)
        if number is None:
            raise EvaluationError(
                f"eval_func returned the metric {name!r} as {_shown(item)}: it must be a number"
            )
        metrics[str(name)] = number
    if metric is None and len(metrics) == 1:
        (metric,) = metrics
    if metric is None or metric not in metrics:
        raise EvaluationError(
            f"eval_func returned the metrics {', '.join(metrics) or '(none)'}, and the goal's "
            f"metric is {metric!r}: name the one that counts, AccuracyGoal(metric=…)"
        )
    return Score(_finite(metrics[metric]), metrics)


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _samples(value: Any) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    if isinstance(value, Tensor):
        if value.is_complex():
            return None
        value = value.detach().cpu().double().numpy()
    if isinstance(value, (list, tuple)) and all(_number(item) is not None for item in value):
        value = np.array([_number(item) for item in value])
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "fiub":
        return None
    return value.astype(np.float64)


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise EvaluationError(f"eval_func returned {number}: a score must be finite")
    return number


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {list(value.shape)} and type {value.dtype}"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '…'} ({type(value).__name__})"
