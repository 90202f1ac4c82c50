"""A plan: for every op that can be quantized, how it is computed."""

import hashlib
import json
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from tuner.errors import PlanError
from tuner.schemes import OpConfig

_VERSION = 1


class Plan(Mapping[str, OpConfig]):
    """A complete, immutable mapping of op name → OpConfig. Plans are equal if all choices are."""

    def __init__(self, ops: Mapping[str, OpConfig]) -> None:
        for name, config in ops.items():
            if not isinstance(config, OpConfig):
                raise PlanError(f"plan[{name!r}] is {config!r}: it must be an OpConfig")
        self._ops = dict(ops)

    def __getitem__(self, name: str) -> OpConfig:
        return self._ops[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ops)

    def __len__(self) -> int:
        return len(self._ops)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._ops == other._ops

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Plan({len(self)} ops, {len(self.quantized)} quantized)"

    @property
    def quantized(self) -> tuple[str, ...]:
        """The names of the ops that are not left in FP32."""
        return tuple(name for name, config in self._ops.items() if not config.is_float)

    @property
    def digest(self) -> str:
        """A SHA-256 of the plan's JSON with sorted names, the same in every process."""
        text = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def diff(self, other: "Plan") -> dict[str, tuple[OpConfig | None, OpConfig | None]]:
        """Return name → (ours, theirs) for every op on which the two plans differ."""
        names = dict.fromkeys((*self._ops, *other._ops))
        pairs = {name: (self._ops.get(name), other._ops.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_json(self, indent: int | None = None) -> str:
        """Return `{"version": 1, "ops": {name: {"weight", "inputs", "output", …}}}`."""
        ops = {name: config.model_dump(mode="json") for name, config in self._ops.items()}
        return json.dumps({"version": _VERSION, "ops": ops}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote; raises PlanError on anything else."""
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise PlanError(f"plan version {data['version']!r}: this tuner reads {_VERSION}")
            return cls(
                {n: OpConfig.model_validate_json(json.dumps(c)) for n, c in data["ops"].items()}
            )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise PlanError(f"not a plan: {error}. A plan is what Plan.to_json() writes") from error
