"""Plans that are trained before they are judged: Training, and what runs it inside a search."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tuner.errors import TunerError
from tuner.isolation import RandomState
from tuner.plan import Plan
from tuner.quantized_model import QuantizedModel
from tuner.repairs import LSQ, QAT, SCALINGS, TRAININGS, name_of
from tuner.saving import Parts
from tuner.schemes import OpConfig
from tuner.trainable_preparation import prepare_qat
from tuner.training import Loss, TrainFunc, can_train, fit_qat


@dataclass(frozen=True)
class Training:
    """How a search trains plans.

    `train` is what `fit_qat()` takes: `(train_dataloader, loss)`, or a function that trains a model
    for one epoch. A plan is trained for `search_epochs` before it is judged, and the one that is
    returned for `epochs`, if that makes it better. `lr` is the learning rate of weights, `scale_lr`
    of learned scales (a tenth of it by default). `attempts` is how many plans that missed the goal
    are trained when the search is over.
    """

    train: TrainFunc | tuple[Iterable[Any], Loss]
    search_epochs: int = 1
    epochs: int = 10
    lr: float = 1e-3
    scale_lr: float | None = None
    attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("search_epochs", "epochs"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise TunerError(f"{name} is {getattr(self, name)!r}: give a whole number above 0")
        if type(self.attempts) is not int or self.attempts < 0:
            raise TunerError(f"attempts is {self.attempts!r}: give a whole number, 0 or more")

    @classmethod
    def of(cls, given: object) -> "Training":
        """Return what `fit(train_func=…)` stands for; raises TunerError for anything else."""
        if isinstance(given, Training):
            return given
        if can_train(given):
            return cls(tuple(given) if isinstance(given, list) else given)  # type: ignore[arg-type]
        raise TunerError(
            f"train_func is a {type(given).__name__}: give a function that trains the model for "
            "one epoch, (train_dataloader, loss), or a Training"
        )


class PlanTrainer:
    """Trains the plans of one search; each starts from the float model and the same random state.

    `parts_of` returns what a plan is on the prepared model.
    """

    def __init__(
        self, training: Training, random_state: RandomState, parts_of: Callable[[Plan], Parts]
    ) -> None:
        self.training = training
        self._random_state = random_state
        self._parts_of = parts_of

    def trained(self, plan: Plan, epochs: int | None = None) -> QuantizedModel:
        """Return the model of a plan, trained for so many epochs, by default those of a search."""
        method = method_of(plan)
        assert method is not None
        self._random_state.restore()
        trainable = prepare_qat(QuantizedModel(self._parts_of(plan)), method=method)
        training = self.training
        fit_qat(
            trainable,
            training.train,
            epochs or training.search_epochs,
            lr=training.lr,
            scale_lr=training.scale_lr,
            progress=False,
        )
        return trainable.to_quantized()


def method_of(plan: Plan) -> Any:
    """Return how a plan is trained, None where it is not; `lsq` where one of its ops is."""
    asked = {name for config in plan.values() for name in TRAININGS if name in config.recovery}
    return LSQ if LSQ in asked else QAT if asked else None


def to_train(plan: Plan) -> Plan:
    """Return a plan with learned scales in every quantized op that has no training.

    Trained weights are rounded to nearest, and biases train with them.
    """
    return Plan({name: _to_train(config) for name, config in plan.items()})


def _to_train(config: OpConfig) -> OpConfig:
    if config.is_float or any(name in config.recovery for name in TRAININGS):
        return config
    kept = (repair for repair in config.recovery if name_of(repair) in SCALINGS)
    return config.model_copy(update={"recovery": (*kept, LSQ)})
