"""What the user asks of one tuning run: TuningConfig, SearchSpace and Rule."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from strategies import STRATEGIES
from tuner.criteria import AccuracyGoal
from tuner.errors import UnknownNameError
from tuner.repairs import PROPOSED, SUPPORTED
from tuner.schemes import OpConfig

PRESETS = (
    "int8",
    "int8-dynamic",
    "int4-weight-only",
    "mixed-int",
    "fp8",
    "mx",
    "everything",
)
COST_OF_OBJECTIVE = {"size": "size_bytes", "bops": "bops", "latency": "latency_ms"}

# Lists are accepted and kept as tuples, so that a configuration can be hashed.
_Names = Annotated[Sequence[str], Field(min_length=1), AfterValidator(tuple)]
_Options = Annotated[Sequence[OpConfig], Field(min_length=1), AfterValidator(tuple)]


class _Configuration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Configuration):
    """The options of every op whose type and name match; without either, of every op.

    `names` are globs over op names (`encoder.*`). Of several rules that match, the last wins.
    """

    op_types: _Names | None = None
    names: _Names | None = None
    options: _Options


class SearchSpace(_Configuration):
    """A preset, and rules that replace its options for the ops that they match.

    `repairs` are those that a preset's options may get where they are predicted to help: the quick
    ones by default, none with (). A rule's options have the repairs that they name.
    """

    preset: str = "int8"
    rules: Annotated[Sequence[Rule], AfterValidator(tuple)] = ()
    repairs: Annotated[Sequence[str], AfterValidator(tuple)] = PROPOSED

    @field_validator("repairs")
    @classmethod
    def _known_repairs(cls, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(_known("repair for presets", name, SUPPORTED) for name in names)

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        return _known("preset", name, PRESETS)


class TuningConfig(_Configuration):
    """One tuning run: the goal, what may be chosen, how it is searched, and the budget.

    `max_trials` counts evaluations beside the FP32 baseline's; `timeout_s` counts from the start
    of the run; `calib_samples` bounds the calibration samples that are read.
    """

    goal: AccuracyGoal = AccuracyGoal()
    space: str | SearchSpace = "int8"
    strategy: str = "auto"
    objective: str = "bops"
    max_trials: int = Field(default=50, ge=0)
    timeout_s: float | None = Field(default=None, allow_inf_nan=False)
    calib_samples: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**31)
    target: str | None = None

    @property
    def search_space(self) -> SearchSpace:
        """The space, with a preset's name spelled out as a SearchSpace."""
        return SearchSpace(preset=self.space) if isinstance(self.space, str) else self.space

    @property
    def cost_name(self) -> str:
        """The key of a record's costs that the objective makes small."""
        return COST_OF_OBJECTIVE[self.objective]

    @field_validator("space")
    @classmethod
    def _known_space(cls, space: str | SearchSpace) -> str | SearchSpace:
        return _known("space", space, PRESETS) if isinstance(space, str) else space

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, name: str) -> str:
        return _known("strategy", name, tuple(STRATEGIES))

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        return _known("objective", name, tuple(COST_OF_OBJECTIVE))

    @field_validator("timeout_s")
    @classmethod
    def _leaves_time(cls, timeout_s: float | None) -> float | None:
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(
                f"a timeout_s of {timeout_s:g} leaves no time: give seconds above 0, or None"
            )
        return timeout_s


def _known(kind: str, name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise UnknownNameError(kind, name, names)
    return name
