"""What the user's metric says of an artifact, beside the simulation and its own floor."""

from dataclasses import dataclass, replace

from tuner.evaluation import Evaluator
from tuner.exporters.disturbance import disturbed
from tuner.exporters.report import ExportReport
from tuner.model import InstrumentedModel

CLOSE = 0.002
"""Of the simulated metric: differences up to this are taken for none."""

_DRAWS = 2  # an evaluation may take minutes


@dataclass(frozen=True)
class MetricFloor:
    """The metric of a simulation, and how far a disturbance of some 1e-6 alone moves it.

    `floor` is None where the artifact's metric is so close that nobody needs to know.
    """

    simulated: float
    floor: float | None

    @classmethod
    def of(cls, metric: float, model: InstrumentedModel, evaluate: Evaluator) -> "MetricFloor":
        """Evaluate a model with a plan on it once, and disturbed only where `metric` is not close.

        It is disturbed twice at most: once is enough where that moves it as far as `metric` is.
        """
        simulated = evaluate(model.copy().model).accuracy
        apart = abs(metric - simulated)
        if apart <= CLOSE * abs(simulated):
            return cls(simulated, None)
        floor = 0.0
        for seed in range(_DRAWS):
            moved = evaluate(disturbed(model, seed).model).accuracy
            floor = max(floor, abs(moved - simulated))
            if floor >= apart:
                break
        return cls(simulated, floor)


def with_metric_floor(
    report: ExportReport, model: InstrumentedModel, evaluate: Evaluator
) -> ExportReport:
    """Return a report with the simulated metric beside the artifact's, where there is one.

    A note warns where both are further apart than 0.2 % and than the floor.
    """
    if report.metric is None:
        return report
    found = MetricFloor.of(report.metric, model, evaluate)
    notes = report.notes
    if found.floor is not None and found.floor < abs(report.metric - found.simulated):
        notes = (_warning(report.metric, found.simulated, found.floor), *notes)
    return replace(report, simulated_metric=found.simulated, metric_floor=found.floor, notes=notes)


def _warning(metric: float, simulated: float, floor: float) -> str:
    return (
        f"Warning: eval_func gives {metric:.5g} on the artifact and {simulated:.5g} on the "
        f"simulation. That is more than {CLOSE:.1%} apart, and more than the {floor:.3g} by which "
        "rounding alone moved it: judge the artifact by its own metric, not by that of the search"
    )
