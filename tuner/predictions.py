"""What is predicted of the options of every op: what a study stores, so as not to predict anew."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.op_table import Damages
from tuner.ops import Op
from tuner.presets import Candidate
from tuner.recovery.scaling import Scaling
from tuner.repairs import SCALINGS, name_of
from tuner.schemes import OpConfig
from tuner.search_space import FLOAT, best_variants
from tuner.sensitivity import Sensitivity

Options = dict[str, dict[str, dict[str, Any]]]
"""Op → label → {"config", "damage", "unrepaired"}."""


@dataclass(frozen=True)
class Predictions:
    """The options of every op, each with its damage and what that would be without repairs."""

    options: Options

    @property
    def candidates(self) -> dict[str, list[Candidate]]:
        """The options as a space takes them."""
        return {
            op: [_candidate(label, entry["config"]) for label, entry in options.items()]
            for op, options in self.options.items()
        }

    @property
    def damages(self) -> Damages:
        """The predicted damage of every option."""
        return self._by_config("damage")

    @property
    def unrepaired(self) -> Damages:
        """The damage of every option without its repairs; FP32 has none."""
        return self._by_config("unrepaired")

    def _by_config(self, key: str) -> Damages:
        return {
            op: {c.config: self.options[op][c.label][key] for c in candidates}
            for op, candidates in self.candidates.items()
        }


def predicted(
    ops: Mapping[str, Op],
    candidates: Mapping[str, list[Candidate]],
    sensitivities: Mapping[str, Sensitivity],
    scalings: Iterable[Scaling],
    calibrates: bool = True,
) -> Predictions:
    """Return the predictions, inputs calibrated and weights rounded to least harm.

    Without `calibrates` the inputs keep their calibration methods.
    """
    gains = {name: s.gain for s in scalings for name in s.chain.consumers}
    found: Options = {}
    for name, options in candidates.items():
        op, sensitivity = ops[name], sensitivities.get(name)
        if sensitivity is not None:
            options = best_variants(op, options, sensitivity, calibrates)
        found[name] = {
            option.label: _entry(op, option.config, sensitivity, gains.get(name, 1.0))
            for option in options
        }
    return Predictions(found)


def _entry(
    op: Op, config: OpConfig, sensitivity: Sensitivity | None, gain: float
) -> dict[str, Any]:
    damage, plain = 0.0, 0.0
    if sensitivity is not None:
        damage = sensitivity.damage(op, config)
        plain = sensitivity.damage(op, _untreated(config)) * gain
    return {"config": config.model_dump(mode="json"), "damage": damage, "unrepaired": plain}


def _untreated(config: OpConfig) -> OpConfig:
    """Return a configuration without the repairs of its weight."""
    others = tuple(r for r in config.recovery if name_of(r) in SCALINGS)
    return config.model_copy(update={"recovery": others})


def _candidate(label: str, config: Mapping[str, Any]) -> Candidate:
    if label == FLOAT.label:
        return FLOAT
    return Candidate(label, OpConfig.model_validate_json(json.dumps(config)))
