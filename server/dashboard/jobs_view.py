"""What the list of jobs and the head of a job's page show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from server.dashboard import words
from server.dashboard.searches import baseline_costs
from server.db import Database
from server.db.models import JobRow
from server.ranking import as_number
from server.states import State
from tuner.config import TuningConfig


@dataclass(frozen=True)
class JobCard:
    """A job in a few figures. `cost_ratio` is that of the best trial so far to FP32."""

    id: str
    recipe: str
    labels: Mapping[str, str]
    owner: str
    state: State
    trials: int
    max_trials: int
    accuracy: float | None
    baseline: float | None
    cost_ratio: float | None
    objective: str
    goal_met: bool | None
    quantized_ops: int | None
    attempt: int
    max_attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    stop_reason: str | None
    error: str | None
    moves: tuple[str, ...]

    @property
    def short_id(self) -> str:
        """The end of the id, in which jobs of the same minute differ."""
        return self.id[-6:]

    @property
    def is_live(self) -> bool:
        """Whether more can happen to it."""
        return words.is_live(self.state)

    @property
    def change(self) -> str:
        """How the best accuracy changed against FP32."""
        return words.change(self.accuracy, self.baseline)

    @property
    def is_float(self) -> bool:
        """Whether it succeeded with nothing quantized."""
        return self.state == State.SUCCEEDED and self.quantized_ops == 0

    @property
    def seconds(self) -> float | None:
        """How long it took from its first start to its end."""
        if self.started_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.started_at).total_seconds()


def cards(database: Database, jobs: Sequence[JobRow]) -> list[JobCard]:
    """Return the cards of some jobs."""
    costs = baseline_costs(database, [job.study_name for job in jobs])
    return [card(job, costs.get(job.study_name, {})) for job in jobs]


def card(job: JobRow, baseline: Mapping[str, float]) -> JobCard:
    """Return a job's card; `baseline` holds the costs of FP32, as far as they are known."""
    config = TuningConfig.model_validate(job.config)
    state = State(job.state)
    best = job.best or {}
    accuracy = best.get("accuracy")
    return JobCard(
        id=job.id,
        recipe=job.recipe,
        labels=job.labels,
        owner=job.owner,
        state=state,
        trials=job.trials,
        max_trials=config.max_trials,
        accuracy=None if accuracy is None else as_number(accuracy),
        baseline=job.baseline,
        cost_ratio=_ratio(best.get("costs", {}), baseline, config.cost_name),
        objective=config.objective,
        goal_met=job.goal_met if job.goal_met is not None else best.get("meets_goal"),
        quantized_ops=job.quantized_ops,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        stop_reason=job.stop_reason,
        error=job.error,
        moves=words.moves(state),
    )


def _ratio(ours: Mapping[str, float], theirs: Mapping[str, float], name: str) -> float | None:
    cost, whole = ours.get(name), theirs.get(name)
    return float(cost) / whole if cost is not None and whole else None
