"""How times, states and numbers read on the pages."""

from datetime import UTC, datetime

from markupsafe import Markup

from server.states import ENDED, TRANSITIONS, Move, State

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_ASKED = (Move.PAUSE, Move.RESUME, Move.CANCEL)

STOPPED = {
    "goal_met_and_minimal": "the goal is met and nothing cheaper is likely to meet it",
    "max_trials": "the budget of trials was used up",
    "timeout": "the time was used up",
    "exhausted": "the strategy had nothing left to try",
    "cancelled": "it was cancelled",
    "no_eval_func": "there was no eval_func: the model was calibrated only",
}
OBJECTIVES = {"size": "size", "bops": "bit operations", "latency": "latency"}


def ago(moment: datetime | None) -> Markup:
    """Return a time as how long ago it is, with the moment itself in its title."""
    if moment is None:
        return Markup("–")
    spelled = moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Markup('<time datetime="{}" title="{}" data-ago>{}</time>').format(
        moment.astimezone(UTC).isoformat(), spelled, _distance(moment)
    )


def _distance(moment: datetime) -> str:
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, name in _UNITS:
        if abs(seconds) >= unit:
            whole = round(abs(seconds) // unit)
            return f"{whole} {name} ago" if seconds > 0 else f"in {whole} {name}"
    return "just now"


def clock(moment: datetime) -> Markup:
    """Return a time of day, with the moment itself in its title."""
    utc = moment.astimezone(UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        utc.isoformat(), utc.strftime("%Y-%m-%d %H:%M:%S UTC"), utc.strftime("%H:%M:%S")
    )


def moves(state: State) -> tuple[str, ...]:
    """Return what a person can ask of a job in this state, and changes something."""
    targets = TRANSITIONS[state]
    return tuple(str(move) for move in _ASKED if targets.get(move, state) != state)


def is_live(state: State) -> bool:
    """Return whether more can happen to a job in this state."""
    return state not in ENDED


def change(ours: float | None, theirs: float | None) -> str:
    """Return how a metric changed against FP32, as a signed percentage of it."""
    if ours is None or theirs is None:
        return "–"
    difference = ours - theirs
    text = f"{100 * difference / abs(theirs):+.3g} %" if theirs else f"{difference:+.4g}"
    return text.replace("-", "−")
