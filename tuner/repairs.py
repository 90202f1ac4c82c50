"""The names of the repairs that an OpConfig may ask for, their order and their parameters."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from tuner.errors import UnknownNameError

EQUALIZATION, SMOOTHQUANT, AWQ = "equalization", "smoothquant", "awq"
BIAS_ABSORPTION = "bias_absorption"
GPTQ, QUANTEASE, ADAROUND = "gptq", "quantease", "adaround"
BIAS_CORRECTION = "bias_correction"
BN_REESTIMATION = "bn_reestimation"
QAT, LSQ = "qat", "lsq"

FACTORS = (EQUALIZATION, SMOOTHQUANT, AWQ)
"""Move magnitude between a layer and the one before it; the float function stays as it is."""

SCALINGS = (*FACTORS, BIAS_ABSORPTION)
"""What is done to the channels between two layers, for all their options: factors, and offsets."""

ROUNDINGS = (GPTQ, QUANTEASE, ADAROUND)
"""Choose for each weight of an op whether it is rounded up or down."""

TRAININGS = (QAT, LSQ)

SUPPORTED = (*SCALINGS, *ROUNDINGS, BIAS_CORRECTION, BN_REESTIMATION)
"""What needs no training."""

PROPOSED = (*SCALINGS, GPTQ, BIAS_CORRECTION)
"""What a preset's options get by themselves where it is predicted to help; see SearchSpace."""

REPAIRS = (*SCALINGS, *ROUNDINGS, BIAS_CORRECTION, BN_REESTIMATION, *TRAININGS)
"""All repairs, in the order in which they are applied."""


class Repair(BaseModel):
    """A repair with a parameter.

    `alpha`, 0…1, is the power of the activation in the factors of smoothquant and awq: how much of
    the difficulty goes from it to the weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    alpha: float | None = Field(default=None, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _known(self) -> "Repair":
        check_name(self.name)
        if self.alpha is not None and self.name not in (SMOOTHQUANT, AWQ):
            raise ValueError(f"{self.name} has no parameter alpha: leave it out")
        return self

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {"name": self.name} | ({} if self.alpha is None else {"alpha": self.alpha})

    def __str__(self) -> str:
        return self.name if self.alpha is None else f"{self.name} {self.alpha:g}"


def check_name(name: str) -> None:
    """Raise UnknownNameError for a name that is no repair."""
    if name not in REPAIRS:
        raise UnknownNameError("repair", name, REPAIRS)


def name_of(repair: str | Repair) -> str:
    """Return the name of a repair, given with parameters or without."""
    return repair if isinstance(repair, str) else repair.name


def rounding_of(repairs: tuple[str | Repair, ...]) -> str | None:
    """Return the one rounding among repairs, None where weights are rounded to nearest."""
    return next((name for name in map(name_of, repairs) if name in ROUNDINGS), None)


def in_order(repairs: tuple[str | Repair, ...]) -> tuple[str | Repair, ...]:
    """Return repairs as they are applied, bare names as strings; ValueError for what clashes."""
    plain = [r.name if isinstance(r, Repair) and r.alpha is None else r for r in repairs]
    names = [name_of(repair) for repair in plain]
    for name in names:
        check_name(name)
    for kind in (FACTORS, ROUNDINGS, (BIAS_CORRECTION,), (BN_REESTIMATION,), TRAININGS):
        chosen = [name for name in names if name in kind]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: choose one of them")
    return tuple(sorted(plain, key=lambda repair: REPAIRS.index(name_of(repair))))
