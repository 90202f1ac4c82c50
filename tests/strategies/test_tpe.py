"""TPE's knobs, and that its study learns from what it is told."""

from strategies.base import Outcome
from strategies.replay import SearchRun
from strategies.space import Option, Space, Unit
from strategies.tpe import TPE, make_knobs
from strategies.uniform import uniform_plans
from tests.strategies import landscapes

_OPTIONS = tuple(Option(f"W{b}A8", 8.0 * b, 4.0**-b) for b in (2, 4, 8))
_FLOAT = Option("FP32", 1024.0, 0.0, is_float=True)


def _space(*kinds: str) -> Space:
    return Space(tuple(Unit(f"{k}.{i}", k, (*_OPTIONS, _FLOAT)) for i, k in enumerate(kinds)))


def test_few_units_have_a_knob_each() -> None:
    knobs = make_knobs(_space(*["Conv2d"] * 30, *["Linear"] * 10))
    assert [knob.units for knob in knobs] == [(k,) for k in range(40)]


def test_many_units_share_about_forty_knobs_with_neighbours_of_their_kind() -> None:
    space = _space(*["Conv2d", "Linear"] * 80, *["Embedding"])
    knobs = make_knobs(space)
    assert 30 <= len(knobs) <= 42
    assert sorted(unit for knob in knobs for unit in knob.units) == list(range(161))
    for knob in knobs:
        assert len({space.units[unit].kind for unit in knob.units}) == 1
        assert knob.size == 4


def test_units_with_other_options_never_share_a_knob() -> None:
    space = _space(*["Linear"] * 41)
    units = (*space.units, Unit("last", "Linear", _OPTIONS))
    assert make_knobs(Space(units))[-1].units == (41,)


def test_starts_from_the_uniform_plans() -> None:
    landscape = landscapes.mixed_int("tpe", 12, 1)
    plans = [plan.assignment for plan in reversed(uniform_plans(landscape.space))]
    run = SearchRun(TPE(landscape.space), {})
    proposed = []
    for _ in plans:
        proposal = run.next()
        assert proposal is not None
        proposed.append(proposal.assignment)
        run.tell(landscape.evaluate(proposal.assignment))
    assert proposed == plans


def test_learns_which_option_the_goal_needs() -> None:
    space = _space(*["Linear"] * 8)
    search = TPE(space, seed=1).search()
    proposal, chosen = next(search), []
    for _ in range(60):
        plan = proposal.assignment
        chosen.append(plan)
        violation = float(plan.count(0)) - 0.5  # the goal is met without any W2
        proposal = search.send(Outcome(plan, space.cost(plan), violation))
    at_random = len(space.units) / 4
    assert sum(plan.count(0) for plan in chosen[-20:]) / 20 < at_random / 2
