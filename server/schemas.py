"""The JSON of the service: what clients send and what they get."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, field_validator

from server import strict_json
from server.auth import Scope
from server.states import State
from tuner.config import TuningConfig

Item = TypeVar("Item")
EventKind = Literal["state", "trial", "progress", "error"]

# PostgreSQL's text and JSON hold no NUL
_NO_NUL = r"^[^\x00]*$"
Name = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=_NO_NUL)]
LabelName = Annotated[
    str, StringConstraints(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
]
Label = Annotated[str, StringConstraints(max_length=255, pattern=_NO_NUL)]


class _Body(BaseModel):
    """What a client sends: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Submission(_Body):
    """A job to be run: a recipe, its parameters, and what the search is to do."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "recipe": "digits-resnet",
                    "params": {"epochs": 20},
                    "config": {"space": "mixed-int", "max_trials": 30},
                    "labels": {"team": "vision"},
                }
            ]
        }
    )

    recipe: Name
    params: dict[str, Any] = Field(default_factory=dict)
    config: TuningConfig = TuningConfig()
    priority: int = Field(default=0, ge=-1000, le=1000)
    labels: dict[LabelName, Label] = Field(default_factory=dict, max_length=32)
    max_attempts: int = Field(default=3, ge=1, le=100)
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @field_validator("params", "config")
    @classmethod
    def _is_strict_json(cls, value: Any) -> Any:
        is_model = isinstance(value, BaseModel)
        strict_json.check(value.model_dump() if is_model else value)
        return value


class Progress(_Answer):
    """How far a job is: trials beside the baseline."""

    trials: int
    max_trials: int


class JobLinks(_Answer):
    """Where to go on from a job."""

    self: str
    trials: str
    events: str
    artifacts: str
    cancel: str
    pause: str
    resume: str

    @classmethod
    def of(cls, job_id: str) -> "JobLinks":
        """Return the links of a job."""
        path = f"/v1/jobs/{job_id}"
        below = {name: f"{path}/{name}" for name in ("trials", "events", "artifacts")}
        moves = {name: f"{path}:{name}" for name in ("cancel", "pause", "resume")}
        return cls(self=path, **below, **moves)


class Job(_Answer):
    """A job. `best` is its best trial so far, without the plan; `error` says why it failed."""

    id: str
    recipe: str
    params: dict[str, Any]
    config: TuningConfig
    priority: int
    labels: dict[str, str]
    max_attempts: int
    timeout_s: float | None
    state: State
    attempt: int
    owner: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    progress: Progress
    baseline: float | None
    best: dict[str, Any] | None
    goal_met: bool | None
    quantized_ops: int | None
    stop_reason: str | None
    error: str | None
    links: JobLinks


class Trial(_Answer):
    """A trial, as tuner.TrialRecord writes it: NaN and ±inf are spelled as strings."""

    number: int
    plan: dict[str, Any]
    accuracy: float | str | None
    metrics: dict[str, float | str]
    costs: dict[str, float | str]
    meets_goal: bool | None
    state: str
    duration_s: float
    reason: str
    error: str | None
    scores: list[float | str] | None = None


class OpChoice(_Answer):
    """An op of the best plan: what was chosen for it, and what that costs."""

    name: str
    type: str
    shape: list[int]
    parameters: int
    macs: float | str
    choice: str
    predicted_damage: float | str
    size_bytes: float | str
    bops: float | str
    cost_share: float | str
    repairs: list[str] = []
    unrepaired_damage: float | str | None = None


class Event(_Answer):
    """Something that happened to a job; ids grow."""

    id: int
    kind: EventKind
    data: dict[str, Any]
    created_at: datetime


class Page(_Answer, Generic[Item]):
    """A part of a list; `next_cursor` is null on the last one."""

    items: list[Item]
    next_cursor: str | None


class Artifact(_Answer):
    """A file of a job."""

    name: str
    media_type: str
    size_bytes: int
    sha256: str
    created_at: datetime
    href: str


class RecipeInfo(_Answer):
    """A recipe that jobs can name; `parameters` is the JSON schema of its parameters."""

    name: str
    summary: str
    parameters: dict[str, Any]


class BrokenRecipe(_Answer):
    """A file or entry point that should give recipes, but does not."""

    source: str
    error: str


class Recipes(Page[RecipeInfo]):
    """The recipes, and what could not be loaded."""

    broken: list[BrokenRecipe]


class Asset(_Answer):
    """An upload; its id, the SHA-256 of its bytes, is what a recipe's parameters name."""

    id: str
    kind: Literal["safetensors", "npz"]
    name: str
    size_bytes: int
    created_at: datetime


class TokenRequest(_Body):
    """A token to be made: who has it, what it allows, and until when (for ever, if null)."""

    name: Name
    scopes: list[Scope] = Field(min_length=1, max_length=len(Scope))
    expires_at: AwareDatetime | None = None


class Token(_Answer):
    """A token, without what is secret; its name owns the jobs that it submits."""

    id: str
    name: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class NewToken(Token):
    """A token with its secret, which is shown this once."""

    token: str


class WorkerInfo(_Answer):
    """A worker, and the jobs that it holds."""

    id: str
    host: str
    pid: int
    state: Literal["running", "draining", "ended", "lost"]
    slots: int
    gpus: list[str]
    version: str
    started_at: datetime
    heartbeat_at: datetime
    jobs: list[str]


class Health(_Answer):
    """That the service runs, and which version it is."""

    status: Literal["ok"]
    version: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it; other members may tell more."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
