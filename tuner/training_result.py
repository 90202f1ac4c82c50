"""What a training run gave: TrainingResult, and the error that ends one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from tuner.errors import SaveError, TunerError
from tuner.records import decode_floats, encode_float, encode_floats

TrainingStop = Literal["all_epochs", "cancelled", "loss_not_finite", "interrupted"]
_VERSION = 1


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, numbered from 1: its mean loss, and the accuracy after it.

    `quantized` says whether values were rounded from its first step on. Loss and accuracy are None
    where nobody told them.
    """

    number: int
    loss: float | None
    accuracy: float | None
    quantized: bool
    duration_s: float
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON."""
        return asdict(self) | {
            "loss": _encoded(self.loss),
            "accuracy": _encoded(self.accuracy),
            "metrics": encode_floats(self.metrics),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EpochRecord":
        """Read what `to_dict` wrote."""
        return cls(
            number=int(data["number"]),
            loss=_decoded(data["loss"]),
            accuracy=_decoded(data["accuracy"]),
            quantized=bool(data["quantized"]),
            duration_s=float(data["duration_s"]),
            metrics=decode_floats(data["metrics"]),
        )


@dataclass(frozen=True)
class TrainingResult:
    """How training went. The model is as it was after `best_epoch`; 0 is before the first.

    `accuracy_before` is that of the quantized model before training, `accuracy_after` that of what
    was kept; None where nothing evaluated them. `steps` counts optimizer steps.
    """

    accuracy_before: float | None
    accuracy_after: float | None
    best_epoch: int
    epochs: tuple[EpochRecord, ...]
    stop_reason: TrainingStop
    steps: int
    duration_s: float

    @property
    def losses(self) -> tuple[float | None, ...]:
        """The mean loss of every epoch."""
        return tuple(epoch.loss for epoch in self.epochs)

    def summary(self) -> str:
        """Return the result as text."""
        before, after = (_shown(value) for value in (self.accuracy_before, self.accuracy_after))
        return (
            f"accuracy  {before} before training, {after} after\n"
            f"kept      epoch {self.best_epoch} of {len(self.epochs)}\n"
            f"training  {self.steps} steps in {self.duration_s:.1f} s, stopped: {self.stop_reason}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON that holds the whole result."""
        return {
            "version": _VERSION,
            "accuracy_before": _encoded(self.accuracy_before),
            "accuracy_after": _encoded(self.accuracy_after),
            "best_epoch": self.best_epoch,
            "epochs": [epoch.to_dict() for epoch in self.epochs],
            "stop_reason": self.stop_reason,
            "steps": self.steps,
            "duration_s": self.duration_s,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrainingResult":
        """Read what `to_dict` wrote; raises SaveError on anything else."""
        try:
            if data["version"] != _VERSION:
                raise SaveError(
                    f"training result version {data['version']!r}: this tuner reads {_VERSION}"
                )
            if data["stop_reason"] not in get_args(TrainingStop):
                raise SaveError(f"unknown stop_reason {data['stop_reason']!r}")
            return cls(
                accuracy_before=_decoded(data["accuracy_before"]),
                accuracy_after=_decoded(data["accuracy_after"]),
                best_epoch=int(data["best_epoch"]),
                epochs=tuple(EpochRecord.from_dict(epoch) for epoch in data["epochs"]),
                stop_reason=data["stop_reason"],
                steps=int(data["steps"]),
                duration_s=float(data["duration_s"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SaveError(f"not a training result ({type(error).__name__}: {error})") from error


class TrainingError(TunerError):
    """Training cannot go on. `result` tells how far it came; the model is the best so far."""

    def __init__(self, message: str, result: TrainingResult | None = None) -> None:
        super().__init__(message)
        self.result = result


def _encoded(value: float | None) -> Any:
    return None if value is None else encode_float(value)


def _decoded(value: Any) -> float | None:
    return None if value is None else float(value)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"
