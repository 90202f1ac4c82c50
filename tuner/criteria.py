"""What a quantized model must still achieve: AccuracyGoal."""

import math

from pydantic import BaseModel, ConfigDict, Field, model_validator

_FLOAT32_ROUNDING = 2.0**-23
_DROP_ROUNDING = 1e-4


class AccuracyGoal(BaseModel):
    """The least accuracy that is accepted, judged against the FP32 baseline.

    With b the baseline, a drop of at most `max_drop · |b|` (`relative`) or `max_drop` is allowed,
    in the direction that `higher_is_better` calls worse. `at_least` and `at_most` replace the drop
    by absolute bounds on the metric; `at_most` alone means that lower is better. `metric` names the
    one that counts where `eval_func` returns several. `confidence` asks that the drop holds with
    this probability.

    What misses a bound by less than the rounding of a float32 score meets it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_drop: float = Field(default=0.01, ge=0.0, allow_inf_nan=False)
    relative: bool = True
    higher_is_better: bool = True
    metric: str | None = None
    at_least: float | None = Field(default=None, allow_inf_nan=False)
    at_most: float | None = Field(default=None, allow_inf_nan=False)
    confidence: float | None = Field(default=None, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _bounds_agree(self) -> "AccuracyGoal":
        if self.at_least is None:
            return self
        if self.at_most is None and not self.higher_is_better:
            raise ValueError(
                f"at_least={self.at_least:g} is a lower bound, but higher_is_better is False: "
                "give at_most, or leave higher_is_better True"
            )
        if self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(
                f"at_least={self.at_least:g} lies above at_most={self.at_most:g}: "
                "no value meets both"
            )
        return self

    @property
    def prefers_higher(self) -> bool:
        """Whether more of the metric is better; `at_most` alone means that less is."""
        if self.at_most is not None and self.at_least is None:
            return False
        return self.higher_is_better

    @property
    def is_absolute(self) -> bool:
        """Whether the goal is a bound on the metric itself, whatever the baseline."""
        return self.at_least is not None or self.at_most is not None

    def threshold(self, baseline: float) -> float:
        """Return the value of the metric that is just allowed."""
        bound = self.at_least if self.prefers_higher else self.at_most
        if bound is not None:
            return bound
        allowed = self._allowed_drop(baseline)
        return baseline - allowed if self.prefers_higher else baseline + allowed

    def violation(self, accuracy: float, baseline: float) -> float:
        """Return how far the metric misses the goal, in its own units; ≤ 0 meets it.

        An accuracy that is NaN or infinite misses by inf, and so does every accuracy against a
        baseline that is, unless the goal is absolute.
        """
        if not math.isfinite(accuracy) or not (self.is_absolute or math.isfinite(baseline)):
            return math.inf
        if not self.is_absolute:
            drop = baseline - accuracy if self.prefers_higher else accuracy - baseline
            allowed = self._allowed_drop(baseline)
            rounding = min(_FLOAT32_ROUNDING * abs(baseline), _DROP_ROUNDING * allowed)
            return _beyond(drop, allowed, rounding)
        misses = []
        if self.at_least is not None:
            misses.append(
                _beyond(-accuracy, -self.at_least, _FLOAT32_ROUNDING * abs(self.at_least))
            )
        if self.at_most is not None:
            misses.append(_beyond(accuracy, self.at_most, _FLOAT32_ROUNDING * abs(self.at_most)))
        return max(misses)

    def meets(self, accuracy: float, baseline: float) -> bool:
        """Return whether this accuracy meets the goal."""
        return self.violation(accuracy, baseline) <= 0

    def better(self, a: float, b: float) -> bool:
        """Return whether `a` is strictly better than `b`; NaN is worse than every number."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.prefers_higher else a < b

    def describe(self, baseline: float | None = None) -> str:
        """Return the goal in a few words, with its threshold where the baseline is known."""
        name = self.metric or "accuracy"
        if self.is_absolute:
            bounds = (("≥", self.at_least), ("≤", self.at_most))
            return f"{name} " + " and ".join(
                f"{sign} {v:.5g}" for sign, v in bounds if v is not None
            )
        amount = f"{self.max_drop * 100:g} %" if self.relative else f"{self.max_drop:g}"
        direction = "below" if self.prefers_higher else "above"
        if baseline is None:
            return f"{name} at most {amount} {direction} FP32"
        sign = "≥" if self.prefers_higher else "≤"
        return (
            f"{name} {sign} {self.threshold(baseline):.5g} (at most {amount} {direction} "
            f"{baseline:.5g})"
        )

    def _allowed_drop(self, baseline: float) -> float:
        return self.max_drop * abs(baseline) if self.relative else self.max_drop


def _beyond(value: float, limit: float, rounding: float) -> float:
    """Return value − limit, or 0 where what is beyond the limit is only rounding."""
    excess = value - limit
    return 0.0 if 0.0 < excess <= rounding else excess
