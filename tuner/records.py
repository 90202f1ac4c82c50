"""What is kept of one trial (TrialRecord) and of one op (OpSummary)."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from tuner import formats
from tuner.errors import SaveError, TunerError
from tuner.plan import Plan
from tuner.schemes import OpConfig, TensorScheme

TrialState = Literal["complete", "failed", "stopped_early"]
_STATES = ("complete", "failed", "stopped_early")
_FLOAT_BITS = 32


@dataclass(frozen=True)
class TrialRecord:
    """One plan and what its evaluation gave. Number 0 is the FP32 baseline.

    `accuracy` is None where there was no evaluation or it failed; `metrics` holds every metric
    that `eval_func` returned; `costs` holds `size_bytes`, `bops` and, where measured, `latency_ms`.
    `meets_goal` is None where there was no accuracy to judge. `reason` says why the plan was
    proposed, `error` holds the traceback of a failed trial.
    """

    number: int
    plan: Plan
    accuracy: float | None
    metrics: Mapping[str, float] = field(hash=False)
    costs: Mapping[str, float] = field(hash=False)
    meets_goal: bool | None
    state: TrialState
    duration_s: float
    reason: str = ""
    error: str | None = None
    scores: tuple[float, ...] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON; NaN and ±inf become "nan", "inf" and "-inf"."""
        return {
            "number": self.number,
            "plan": json.loads(self.plan.to_json()),
            "accuracy": None if self.accuracy is None else encode_float(self.accuracy),
            "metrics": encode_floats(self.metrics),
            "costs": encode_floats(self.costs),
            "meets_goal": self.meets_goal,
            "state": self.state,
            "duration_s": self.duration_s,
            "reason": self.reason,
            "error": self.error,
            "scores": None if self.scores is None else [encode_float(s) for s in self.scores],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrialRecord":
        """Read what `to_dict` wrote; raises SaveError on anything else."""
        try:
            if data["state"] not in _STATES:
                raise SaveError(f"state {data['state']!r} of a trial is none of {_STATES}")
            return cls(
                number=int(data["number"]),
                plan=Plan.from_json(json.dumps(data["plan"])),
                accuracy=None if data["accuracy"] is None else float(data["accuracy"]),
                metrics=decode_floats(data["metrics"]),
                costs=decode_floats(data["costs"]),
                meets_goal=data["meets_goal"],
                state=cast(TrialState, data["state"]),
                duration_s=float(data["duration_s"]),
                reason=data["reason"],
                error=data["error"],
                scores=None if data["scores"] is None else tuple(map(float, data["scores"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, TunerError) as error:
            raise SaveError(
                f"not a trial record ({type(error).__name__}: {error}): the file or table that "
                "it was read from is damaged or of another version"
            ) from error


@dataclass(frozen=True)
class OpSummary:
    """One row of the op table: an op, what was chosen for it, and what that costs.

    `shape` is the weight's shape, or the output's where the op has no weight; `choice` is a label
    such as W4A8 or FP32; `cost_share` is the op's share (0…1) of the plan's cost in the objective.
    `repairs` are those of the choice, and `unrepaired_damage` what is predicted without them.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    macs: float
    choice: str
    predicted_damage: float
    size_bytes: float
    bops: float
    cost_share: float
    repairs: tuple[str, ...] = ()
    unrepaired_damage: float | None = None

    @property
    def repair_gain(self) -> float | None:
        """How many times less damage the repairs are predicted to leave, None without any."""
        if not self.repairs or self.unrepaired_damage is None or self.predicted_damage <= 0:
            return None
        return self.unrepaired_damage / self.predicted_damage

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON."""
        plain = self.unrepaired_damage
        return {
            "name": self.name,
            "type": self.type,
            "shape": list(self.shape),
            "parameters": self.parameters,
            "macs": encode_float(self.macs),
            "choice": self.choice,
            "predicted_damage": encode_float(self.predicted_damage),
            "size_bytes": encode_float(self.size_bytes),
            "bops": encode_float(self.bops),
            "cost_share": encode_float(self.cost_share),
            "repairs": list(self.repairs),
            "unrepaired_damage": None if plain is None else encode_float(plain),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "OpSummary":
        """Read what `to_dict` wrote, in this version or before there were repairs."""
        plain = data.get("unrepaired_damage")
        return cls(
            name=str(data["name"]),
            type=str(data["type"]),
            shape=tuple(int(n) for n in data["shape"]),
            parameters=int(data["parameters"]),
            macs=float(data["macs"]),
            choice=str(data["choice"]),
            predicted_damage=float(data["predicted_damage"]),
            size_bytes=float(data["size_bytes"]),
            bops=float(data["bops"]),
            cost_share=float(data["cost_share"]),
            repairs=tuple(map(str, data.get("repairs", ()))),
            unrepaired_damage=None if plain is None else float(plain),
        )


def describe_config(config: OpConfig) -> str:
    """Return a short label of an op's formats: W4A8, W8, A8, A8/A4 (inputs that differ), FP32.

    Integers are named by their width alone, which `reduce_range` makes one less; others by width
    and name, with a space between the operands: "W4:mxfp4 A8:mxfp8_e4m3". An output scheme adds O8
    and a bias scheme B32; an input left in float counts as A32.
    """
    parts = [_spelled("W", config.weight), _describe_inputs(config)]
    parts += [_spelled("O", config.output), _spelled("B", config.bias)]
    separator = " " if any(":" in part for part in parts) else ""
    return separator.join(part for part in parts if part) or "FP32"


def _describe_inputs(config: OpConfig) -> str:
    schemes = config.inputs if isinstance(config.inputs, tuple) else (config.inputs,)
    if not any(schemes):
        return ""
    spelled = [_spelled("A", scheme) or f"A{_FLOAT_BITS}" for scheme in schemes]
    return spelled[0] if len(set(spelled)) == 1 else "/".join(spelled)


def _spelled(operand: str, scheme: TensorScheme | None) -> str:
    if scheme is None:
        return ""
    fmt = formats.get(scheme.format)
    is_plain = fmt.kind == "int" and fmt.block is None
    width = f"{operand}{fmt.bits - scheme.reduce_range}"
    return width if is_plain else f"{width}:{fmt.name}"


def storable(text: str) -> str:
    """Return a text of the user's code without what databases and files refuse.

    That is NUL (PostgreSQL), and halves of surrogate pairs (UTF-8), such as those of file names.
    """
    return text.replace("\0", "").encode(errors="replace").decode()


def encode_float(value: float) -> float | str:
    """Return a value that strict JSON can hold; `float()` reads it back."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def encode_floats(values: Mapping[str, float]) -> dict[str, float | str]:
    """Encode every value of a mapping with `encode_float`."""
    return {name: encode_float(value) for name, value in values.items()}


def decode_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Read what `encode_floats` wrote."""
    return {name: float(value) for name, value in values.items()}
