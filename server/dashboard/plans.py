"""Plans as the trial tables store them: labels, and what differs between two."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tuner.records import describe_config
from tuner.schemes import OpConfig

Ops = Mapping[str, Mapping[str, Any]]
"""Op → its OpConfig as JSON."""


@dataclass(frozen=True)
class Change:
    """An op that two plans treat differently; `before` or `after` is None where it is missing."""

    name: str
    before: str | None
    after: str | None

    @property
    def is_detail(self) -> bool:
        """Whether the formats are the same, and only ranges or granularity differ."""
        return self.before == self.after


def ops_of(record: Mapping[str, Any]) -> Ops:
    """Return the ops of a stored trial's plan."""
    ops: Ops = record["plan"]["ops"]
    return ops


def label(config: Mapping[str, Any]) -> str:
    """Return the short label of an op's configuration: W4A8, FP32."""
    return _label(json.dumps(config, sort_keys=True))


def changes(before: Ops, after: Ops) -> tuple[Change, ...]:
    """Return every op on which two plans differ, in the order of the first."""
    found = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old != new:
            found.append(
                Change(
                    name,
                    None if old is None else label(old),
                    None if new is None else label(new),
                )
            )
    return tuple(found)


@lru_cache(maxsize=4096)
def _label(config: str) -> str:
    return describe_config(OpConfig.model_validate_json(config))
