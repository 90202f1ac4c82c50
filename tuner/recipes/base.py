"""What a recipe is (Recipe), and what it builds (Task)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class Parameters(BaseModel):
    """What the user of a recipe may choose; every recipe has its own subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainingParameters(Parameters):
    """The choices of a recipe that trains its model from scratch."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    epochs: int = Field(default=20, ge=1, le=1000)


@dataclass(frozen=True, eq=False)
class Task:
    """What `fit` needs of one task: the model, calibration batches and the user's `eval_func`.

    `calib_dataloader` can be iterated again and again; `eval_func(model)` returns the value of
    `metric`.
    """

    model: nn.Module
    calib_dataloader: Iterable[Any]
    eval_func: Callable[[nn.Module], float]
    description: str
    metric: str = "accuracy"
    higher_is_better: bool = True


@dataclass(frozen=True)
class Recipe:
    """A named builder of a task; `build` takes an instance of `parameters`."""

    name: str
    summary: str
    parameters: type[Parameters]
    build: Callable[[Any], Task]

    def task(self, **values: Any) -> Task:
        """Build the task from plain values; raises pydantic.ValidationError on bad ones."""
        return self.build(self.parameters(**values))
