"""Jobs in the states that tests need, made the way the service makes them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from server.jobs import Claim, Ending, Jobs
from server.schemas import Submission
from tuner.plan import Plan
from tuner.records import OpSummary, TrialRecord
from tuner.schemes import OpConfig, TensorScheme
from tuner.storage import Storage, StudyHeader, StudyStore

HEADER = StudyHeader(model="m", space="s", strategy="auto", seed=0)
LEASE_S = 60.0
BODY: dict[str, Any] = {"recipe": "digits-resnet", "params": {"epochs": 1}}


def submission(**fields: Any) -> Submission:
    """Return a valid submission."""
    return Submission(**(BODY | fields))


def record(number: int, accuracy: float = 0.9, scores: Sequence[float] | None = None) -> Any:
    """Return the JSON of a trial that meets its goal; later ones are cheaper."""
    w8 = OpConfig(weight=TensorScheme(format="int8"))
    return TrialRecord(
        number=number,
        plan=Plan({"conv1": OpConfig.float() if number == 0 else w8, "fc": w8}),
        accuracy=accuracy,
        metrics={"accuracy": accuracy},
        costs={"size_bytes": 1e6 / (number + 1), "bops": 1e9 / (number + 1)},
        meets_goal=True,
        state="complete",
        duration_s=0.5,
        reason=f"trial {number}",
        scores=None if scores is None else tuple(scores),
    ).to_dict()


def claimed(jobs: Jobs, worker_id: str = "w", lease_s: float = LEASE_S) -> Claim:
    """Claim the next job, which must be there."""
    found = jobs.claim(worker_id, lease_s)
    assert found is not None
    return found[0]


def store(jobs: Jobs, claim: Claim, url: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Store trials the way fit() does, guarded by the claim."""
    job = jobs.get(claim.job_id)
    study = StudyStore.open(Storage(url, partial(jobs.store_trial, claim)), job.study_name, HEADER)
    try:
        for one in records:
            study.add(one["number"], one)
    finally:
        study.close()


OPS = [
    OpSummary("conv1", "Conv2d", (16, 1, 3, 3), 144, 9216.0, "W8A8", 1e-3, 144.0, 6e5, 0.25),
    OpSummary("fc", "Linear", (10, 64), 640, 640.0, "FP32", 0.0, 2560.0, 6e5, 0.75),
]


def succeeded(
    jobs: Jobs,
    url: str,
    trials: int = 3,
    artifacts: Sequence[Mapping[str, Any]] = (),
    goal_met: bool = True,
) -> str:
    """Run a job from its submission to its end; return its id."""
    job, _ = jobs.submit(submission(), "local")
    claim = claimed(jobs)
    assert claim.job_id == job.id
    store(jobs, claim, url, [record(number) for number in range(trials + 1)])
    best = {key: value for key, value in record(trials).items() if key not in ("plan", "scores")}
    ops = [op.to_dict() for op in OPS]
    jobs.succeed(claim, Ending(best, 0.9, goal_met, 1, "max_trials", ops), artifacts)
    return job.id
