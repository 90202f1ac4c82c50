"""Ops that choose together: those that share a weight, and those that must read a tensor alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tuner.errors import SpaceError
from tuner.ops import Op
from tuner.presets import Candidate
from tuner.schemes import OpConfig, TensorScheme

Candidates = Mapping[str, Sequence[Candidate]]
Damages = Mapping[str, Mapping[OpConfig, float]]
Harm = Callable[[str, OpConfig], float]
PriceOf = Callable[[Sequence[Op], Mapping[str, OpConfig]], float]


@dataclass(frozen=True)
class Choice:
    """One option of a unit: what each of its ops gets."""

    label: str
    configs: Mapping[str, OpConfig]


@dataclass(frozen=True)
class TuningUnit:
    """Ops that choose together, and their choices in the order of the strategy's options."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Ties:
    """What a target ties together.

    `leaders` names the ops that follow others, and those; `beside`, for each operand of an op that
    follows, the ops that read the same tensor; `readers` are groups of ops that read one tensor,
    which is to have one scale.
    """

    leaders: Mapping[str, tuple[str, ...]]
    beside: Mapping[str, tuple[tuple[str, ...], ...]]
    readers: tuple[tuple[str, ...], ...]


NO_TIES = Ties({}, {}, ())


@dataclass(frozen=True)
class Follower:
    """An op that is quantized as soon as one of the `leaders` takes quantized inputs.

    An operand has the scheme of the op `beside` it that reads the same tensor, where `known` has
    that, or else the one of `config`.
    """

    name: str
    config: OpConfig
    leaders: tuple[str, ...]
    beside: tuple[tuple[str, ...], ...] = ()
    known: frozenset[OpConfig] = frozenset()

    def config_beside(self, chosen: Mapping[str, OpConfig]) -> OpConfig:
        """Return the op's configuration beside what others have."""
        found = (chosen.get(name, OpConfig.float()) for name in self.leaders)
        is_led = any(config.inputs is not None for config in found)
        return self.config_alike(chosen) if is_led else OpConfig.float()

    def config_alike(self, chosen: Mapping[str, OpConfig]) -> OpConfig:
        """Return the configuration that reads tensors as others do, once the op is quantized."""
        config = self.config
        for index, readers in enumerate(self.beside):
            schemes = [chosen[name].input_scheme(0) for name in readers if name in chosen]
            scheme = next((scheme for scheme in schemes if scheme is not None), None)
            changed = config if scheme is None else _with_input(config, index, scheme)
            config = changed if changed in self.known else config
        return config

    def harm_beside(self, name: str, config: OpConfig, damages: Damages) -> float:
        """Return what it harms beyond `config` that an op has this configuration.

        Each operand counts with the first op beside it.
        """
        if not any(readers and readers[0] == name for readers in self.beside):
            return 0.0
        harms = damages[self.name]
        return harms[self.config_alike({name: config})] - harms[self.config]


def _with_input(config: OpConfig, index: int, scheme: TensorScheme) -> OpConfig:
    assert isinstance(config.inputs, tuple)
    inputs = (*config.inputs[:index], scheme, *config.inputs[index + 1 :])
    return config.model_copy(update={"inputs": inputs})


def followers_of(candidates: Candidates, ties: Ties) -> list[Follower]:
    """Return the ops that follow others, each with its first candidate where nothing is beside."""
    return [
        Follower(
            name=name,
            config=candidates[name][0].config,
            leaders=leaders,
            beside=ties.beside.get(name, ()),
            known=frozenset(candidate.config for candidate in candidates[name]),
        )
        for name, leaders in ties.leaders.items()
        if name in candidates
    ]


def tied(ops: Mapping[str, Op], candidates: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Group the ops that share a weight, in execution order."""
    groups: list[list[str]] = []
    for name in candidates:
        keys = {ref.key for ref in ops[name].weights}
        joined = [g for g in groups if any(keys & {r.key for r in ops[n].weights} for n in g)]
        if not joined:
            groups.append([name])
            continue
        joined[0].extend(n for g in joined[1:] for n in g)
        joined[0].append(name)
        groups = [g for g in groups if g is joined[0] or g not in joined]
    return [tuple(group) for group in groups]


def reading_alike(
    groups: Sequence[tuple[str, ...]], readers: Iterable[Sequence[str]], candidates: Candidates
) -> list[tuple[str, ...]]:
    """Join the groups of one op that read one tensor, where they may read it in the same ways."""
    alone = {group[0] for group in groups if len(group) == 1}
    owner = {name: name for name in alone}
    for found in readers:
        by_schemes: dict[frozenset[TensorScheme | None], str] = {}
        for name in (name for name in found if name in alone):
            schemes = frozenset(c.config.input_scheme(0) for c in candidates[name])
            first = owner[by_schemes.setdefault(schemes, name)]
            owner = {n: first if o == owner[name] else o for n, o in owner.items()}
    joined: dict[str, list[str]] = {}
    for group in groups:
        joined.setdefault(owner.get(group[0], group[0]), []).extend(group)
    return [tuple(group) for group in joined.values()]


def tied_choices(members: Sequence[Op], candidates: Candidates) -> list[Choice]:
    """Combine the options of tied ops: one weight scheme for all, the label of the largest op.

    Raises SpaceError where they have no weight scheme in common.
    """
    lead = max(members, key=lambda op: (len(candidates[op.name]), op.macs))
    choices = []
    for candidate in candidates[lead.name]:
        configs = {lead.name: candidate.config}
        for op in members:
            if op is not lead and (match := _match(candidate, candidates[op.name])) is not None:
                configs[op.name] = match
        if len(configs) == len(members):
            ordered = {op.name: configs[op.name] for op in members}
            choices.append(Choice(candidate.label, ordered))
    if not choices:
        raise SpaceError(
            f"{', '.join(op.name for op in members)} share one weight, but their options have no "
            "weight scheme in common: give them the same one in the rules"
        )
    return choices


def _match(lead: Candidate, options: Sequence[Candidate]) -> OpConfig | None:
    same = [c for c in options if c.config.weight == lead.config.weight]
    labelled = [c for c in same if c.label == lead.label]
    return next((c.config for c in (*labelled, *same)), None)


@dataclass(frozen=True)
class _Joint:
    """Options of several ops, one each, and what they cost and harm together."""

    options: tuple[Candidate, ...] = ()
    cost: float = 0.0
    damage: float = 0.0

    @property
    def is_float(self) -> bool:
        return all(option.config.is_float for option in self.options)

    @property
    def is_mixed(self) -> bool:
        return len({option.label for option in self.options}) > 1

    def label(self, lead: int) -> str:
        own = self.options[lead].label
        return f"{own} mixed" if self.is_mixed else own


def alike_choices(
    members: Sequence[Op], candidates: Candidates, harm: Harm, price_of: PriceOf
) -> list[Choice]:
    """Combine the options of ops that read one tensor: one scheme of it, weights of any bits.

    A member may also stay float. Of all combinations those are kept that are on the lower convex
    hull of cost and damage, for each scheme, and those of one label for all, which come first.
    """
    schemes = {c.config.input_scheme(0): None for op in members for c in candidates[op.name]}
    found: dict[tuple[Candidate, ...], _Joint] = {}
    for scheme in schemes:
        hull = [_Joint()]
        plain = [_Joint()]
        for op in members:
            fitting = [
                _Joint((c,), price_of([op], {op.name: c.config}), harm(op.name, c.config))
                for c in candidates[op.name]
                if c.config.input_scheme(0) == scheme or c.config.is_float
            ]
            hull = _hull([_sum(one, other) for one in hull for other in fitting])
            plain = [_sum(a, b) for a in plain for b in fitting if _same_label(a, b)]
        found |= {joint.options: joint for joint in (*plain, *hull)}
    lead = max(range(len(members)), key=lambda index: members[index].macs)
    ordered = sorted(found.values(), key=lambda joint: (joint.is_float, joint.is_mixed))
    names = [op.name for op in members]
    return [
        Choice(joint.label(lead), dict(zip(names, (o.config for o in joint.options), strict=True)))
        for joint in ordered
    ]


def _sum(first: _Joint, second: _Joint) -> _Joint:
    options = (*first.options, *second.options)
    return _Joint(options, first.cost + second.cost, first.damage + second.damage)


def _same_label(first: _Joint, second: _Joint) -> bool:
    return all(option.label == second.options[0].label for option in first.options)


def _hull(joints: Iterable[_Joint]) -> list[_Joint]:
    """Return the lower convex hull, the cheapest first and the least damaging last."""
    kept: list[_Joint] = []
    for joint in sorted(joints, key=lambda each: (each.cost, each.damage)):
        if kept and joint.damage >= kept[-1].damage:
            continue
        while len(kept) > 1 and _is_above(kept[-2], kept[-1], joint):
            kept.pop()
        kept.append(joint)
    return kept


def _is_above(left: _Joint, middle: _Joint, right: _Joint) -> bool:
    """Whether the line from left to right passes below the middle, or through it."""
    rise = (middle.damage - left.damage) * (right.cost - left.cost)
    return rise >= (right.damage - left.damage) * (middle.cost - left.cost)
