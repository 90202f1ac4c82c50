"""What every strategy must do, over spaces and judges that have broken search before."""

import hashlib
import math
import warnings
from collections.abc import Callable
from itertools import islice, product

import optuna
import pytest

import strategies
from strategies import STRATEGIES, Assignment, Option, Outcome, Proposal, SearchRun, Space, Unit

Judge = Callable[[Space, Assignment], float]

_FLOAT = Option("FP32", 1024.0, 0.0, is_float=True)
_INTEGER = tuple(Option(f"W{b}A8", 8.0 * b, 4.0**-b) for b in (2, 4, 8))
_LIMIT = 40


def _unit(index: int, *options: Option, kind: str = "Linear") -> Unit:
    return Unit(f"op{index}", kind, options)


def _sized(index: int) -> Unit:
    """Return a unit of its own size and sensitivity, with four choices."""
    scaled = [Option(o.label, o.cost * (1 + index), o.damage * 1.7**index) for o in _INTEGER]
    return _unit(index, *scaled, Option("FP32", 1024.0 * (1 + index), 0.0, is_float=True))


SPACES = {
    "no unit": Space(()),
    "one unit": Space((_sized(0),)),
    "two units": Space((_sized(0), _sized(1))),
    "six units": Space(tuple(_sized(k) for k in range(6)), base_cost=100.0),
    "many units": Space(tuple(_sized(k % 7) for k in range(45))),
    "int8 only": Space(tuple(_unit(k, Option("W8A8", 64.0, 0.1), _FLOAT) for k in range(9))),
    "single options": Space((_unit(0, _INTEGER[0]), _unit(1, _FLOAT), _sized(2))),
    "nothing to choose": Space((_unit(0, _FLOAT), _unit(1, _FLOAT))),
    "no float": Space(tuple(_unit(k, *_INTEGER) for k in range(4))),
    "no cost": Space(
        tuple(_unit(k, Option("W8", 0.0, 0.1), Option("FP32", 0.0, 0.0, True)) for k in range(3))
    ),
    "some cost nothing": Space((_unit(0, Option("W8", 0.0, 0.1), _FLOAT), _sized(1), _sized(2))),
    "no damage predicted": Space(
        tuple(_unit(k, Option("W4", 4.0, 0.0), Option("W8", 8.0, 0.0), _FLOAT) for k in range(4))
    ),
    "damage is not finite": Space(
        (
            _unit(0, Option("W2", 2.0, math.inf), Option("W8", 8.0, 0.1), _FLOAT),
            _unit(1, Option("W2", 2.0, math.nan), Option("W8", 8.0, 0.1), _FLOAT),
        )
    ),
    "labels without bits": Space(
        tuple(_unit(k, Option("mx", 9.0, 0.3), Option("nf", 7.0, 0.4), _FLOAT) for k in range(3))
    ),
    "mixed labels": Space(
        (
            _unit(0, Option("W4", 4.0, 0.3), Option("W8", 8.0, 0.1), _FLOAT, kind="Embedding"),
            _unit(1, Option("A4", 4.0, 0.3), Option("A8", 8.0, 0.1), _FLOAT, kind="matmul"),
            _sized(2),
        )
    ),
}


def _threshold(space: Space, assignment: Assignment) -> float:
    damage = space.damage(assignment)
    return math.inf if math.isnan(damage) else damage - 0.02


def _erratic(space: Space, assignment: Assignment) -> float:
    digest = hashlib.sha256(repr(assignment).encode()).digest()
    return digest[0] / 128 - 1


JUDGES: dict[str, Judge] = {
    "all pass": lambda space, assignment: -1.0,
    "none passes": lambda space, assignment: 1.0,
    "all fail": lambda space, assignment: math.inf,
    "all on the edge": lambda space, assignment: 0.0,
    "threshold": _threshold,
    "erratic": _erratic,
    "some fail": lambda space, plan: math.inf if sum(plan) % 2 else _erratic(space, plan),
}

every_strategy = pytest.mark.parametrize("name", list(STRATEGIES))
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))
telling_judge = pytest.mark.parametrize("key", ["all fail", "threshold", "some fail"])
every_judge = pytest.mark.parametrize("judge", JUDGES.values(), ids=list(JUDGES))


def _outcome(space: Space, judge: Judge, assignment: Assignment) -> Outcome:
    return Outcome(assignment, space.cost(assignment), judge(space, assignment))


def _raw(name: str, space: Space, judge: Judge, limit: int = _LIMIT) -> list[Proposal]:
    """Drive the generator itself, without the memory of SearchRun."""
    search = strategies.get(name)(space, seed=3).search()
    proposals: list[Proposal] = []
    try:
        proposal = next(search)
        while len(proposals) < limit:
            proposals.append(proposal)
            proposal = search.send(_outcome(space, judge, proposal.assignment))
    except StopIteration:
        pass
    return proposals


def _resumed(name: str, space: Space, judge: Judge, known: list[Assignment]) -> list[Assignment]:
    """Start again with the outcomes of `known`; return what is proposed after them."""
    outcomes = {a: _outcome(space, judge, a) for a in known}
    run = SearchRun(strategies.get(name)(space, seed=3), outcomes)
    proposed: list[Assignment] = []
    while len(known) + len(proposed) < _LIMIT and (proposal := run.next()) is not None:
        proposed.append(proposal.assignment)
        run.tell(_outcome(space, judge, proposal.assignment))
    return proposed


@every_strategy
@every_space
@every_judge
def test_proposals_are_valid_new_and_explained(name: str, space: Space, judge: Judge) -> None:
    proposals = _raw(name, space, judge)
    assignments = [proposal.assignment for proposal in proposals]
    assert len(set(assignments)) == len(assignments)
    for proposal in proposals:
        chosen = [u.options[i] for u, i in zip(space.units, proposal.assignment, strict=True)]
        assert all(type(i) is int and i >= 0 for i in proposal.assignment)
        assert not all(option.is_float for option in chosen)
        assert proposal.reason


@every_strategy
@every_space
@telling_judge
def test_same_seed_and_outcomes_give_the_same_search(name: str, space: Space, key: str) -> None:
    judge = JUDGES[key]
    assert _raw(name, space, judge, limit=15) == _raw(name, space, judge, limit=15)


@every_strategy
@telling_judge
@pytest.mark.parametrize("shape", ["one unit", "six units", "int8 only"])
def test_resumes_from_every_prefix(name: str, key: str, shape: str) -> None:
    space, judge = SPACES[shape], JUDGES[key]
    whole = _resumed(name, space, judge, [])
    for done in sorted({min(k, len(whole)) for k in (1, 3, 6, 11, 30)}):
        assert _resumed(name, space, judge, whole[:done]) == whole[done:]


@every_strategy
@every_space
@telling_judge
def test_ends_or_is_endless_by_design(name: str, space: Space, key: str) -> None:
    most = {"auto": 19, "basic": 100}.get(name)
    plans = math.prod(len(unit.options) for unit in space.units)
    if most is None and plans > _LIMIT:
        assert len(_raw(name, space, JUDGES[key], _LIMIT)) == _LIMIT
    else:
        most = min(plans, most or plans)
        assert len(_raw(name, space, JUDGES[key], most + 1)) <= most


@pytest.mark.parametrize("name", ["random", "tpe"])
@pytest.mark.parametrize("key", ["one unit", "two units", "no float", "mixed labels"])
def test_samplers_reach_every_plan_of_a_small_space(name: str, key: str) -> None:
    space = SPACES[key]
    plans = set(product(*(range(len(unit.options)) for unit in space.units)))
    plans = {p for p in plans if not _is_float(space, p)}
    found = {p.assignment for p in _raw(name, space, JUDGES["threshold"], limit=len(plans) + 1)}
    assert found == plans


@every_strategy
@pytest.mark.parametrize("key", ["one unit", "two units", "no float"])
def test_finds_a_plan_where_all_pass(name: str, key: str) -> None:
    space = SPACES[key]
    costs = [space.cost(p.assignment) for p in _raw(name, space, JUDGES["all pass"], limit=80)]
    assert min(costs) == space.base_cost + sum(min(o.cost for o in u.options) for u in space.units)


@every_strategy
def test_leaves_optuna_and_warnings_as_they_were(name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    filters = list(warnings.filters)
    try:
        _raw(name, SPACES["two units"], _threshold, limit=5)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
        assert warnings.filters == filters
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


@every_strategy
def test_the_seed_is_a_part_of_the_search(name: str) -> None:
    space = SPACES["many units"]
    first, second = (
        [p.assignment for p in islice(strategies.get(name)(space, seed).search(), 1)]
        for seed in (0, 1)
    )
    assert (first == second) is (name != "random")


def test_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'autoo'.*auto"):
        strategies.get("autoo")


def _is_float(space: Space, assignment: Assignment) -> bool:
    return all(u.options[i].is_float for u, i in zip(space.units, assignment, strict=True))
