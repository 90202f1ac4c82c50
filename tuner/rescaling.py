"""The scaling of channels in a preparation: which chains are scaled, and what follows from it."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tuner.config import TuningConfig
from tuner.data_pass import DataPass
from tuner.errors import SpaceError
from tuner.gradients import Calls, GradientPass
from tuner.granularity import PerTensor
from tuner.model import InstrumentedModel
from tuner.observe import CalibratedRanges
from tuner.operands import OUTPUT, Operands
from tuner.presets import Candidate
from tuner.recovery.chains import Chain, find_chains
from tuner.recovery.channels import ChannelStatistics
from tuner.recovery.float_values import FloatValues
from tuner.recovery.folding import FoldedPair
from tuner.recovery.layers import channel_axis
from tuner.recovery.scale_search import ScaleSearch, Wanted
from tuner.recovery.scaling import FunctionCheck, Scaling, scale
from tuner.repairs import BIAS_ABSORPTION, SCALINGS, Repair, in_order, name_of
from tuner.sites import Call

_log = logging.getLogger(__name__)

_SAMPLES = 32

_NO_ROWS = "after a norm there are only smoothquant and awq"
_NO_CONSTANTS = (
    "that takes biases in fp32 on both sides, no zero padding, nothing but ReLU, max pooling or "
    "reshaping between them, and channels that stay above 0 after a ReLU"
)

Candidates = dict[str, list[Candidate]]
"""Op → its options, FP32 among them."""


class Rescaling:
    """Finds the chains of a model, and scales the channels of those that gain by it.

    `watch` must see the calibration data before `run`.
    """

    def __init__(self, model: InstrumentedModel, data: DataPass, config: TuningConfig) -> None:
        self._channels: dict[str, ChannelStatistics] = {}
        self._model = model
        self._data = data
        self._allowed = tuple(n for n in config.search_space.repairs if n in SCALINGS)
        self._has_target = config.target is not None
        self._seed = config.seed
        self._wanted: dict[Chain, Wanted | None] = {}
        self._floats = FloatValues(model)

    def find(self, folded: Iterable[FoldedPair], candidates: Candidates, ranged: Operands) -> None:
        """Find the chains that may be scaled; raises SpaceError where a rule asks in vain.

        `ranged` are the operands that need a calibrated range.
        """
        model, graph = self._model.model, self._data.graph
        norms = [pair.norm for pair in folded]
        chains = find_chains(model, graph, norms, _fixed(ranged))
        for chain in chains:
            asked = _asked(chain, candidates)
            # runtimes fuse a ReLU6 with integer convolutions, but not a cap of every channel
            is_free = not (chain.caps and self._has_target)
            if asked or (asked is None and self._allowed and is_free):
                self._wanted[chain] = asked
                consumer = chain.consumers[0]
                axis = channel_axis(model.get_submodule(consumer))
                self._channels[consumer] = ChannelStatistics(axis)
        _refuse_vain(candidates, chains)

    def watch(self, op: str, call: Call, index: int, x: Tensor) -> None:
        """Look at an operand of a call."""
        if index == 0 and op in self._channels:
            self._channels[op].update(x)

    def run(self, ranges: CalibratedRanges, candidates: Candidates) -> tuple[Scaling, ...]:
        """Scale, in place, the chains that gain; the ranges of their consumers follow.

        Raises SpaceError where a rule asks for what cannot be done.
        """
        chains = self._reached()
        if not chains:
            return ()
        configs = {
            name: [c.config for c in candidates.get(name, ()) if not c.config.is_float]
            for chain in chains
            for name in chain.consumers
        }
        channels = {chain.producer: self._channels[chain.consumers[0]] for chain in chains}
        calls = self._calls(tuple(configs))
        search = ScaleSearch(self._model, channels, calls, configs, self._allowed)
        check = FunctionCheck(self._model, self._data.feeder, self._data.kept[0])
        found: list[Scaling] = []
        for chain in chains:
            best = search.best(chain, self._wanted[chain])
            if best is not None:
                self._scale(best)
                found.append(best)
        self._refuse_lost(chains, found, None)
        kept = check.kept(found, self._floats)
        if len(kept) < len(found):
            _log.info("%d chains change the model's outputs: left as is", len(found) - len(kept))
            self._refuse_lost(chains, kept, "that changes the outputs of the model")
        for scaling in kept:
            self._replace_ranges(scaling, ranges)
        return kept

    def adopt(self, stored: Iterable[Mapping[str, Any]]) -> tuple[Scaling, ...]:
        """Scale the model as a study has it that is resumed."""
        scalings = tuple(map(Scaling.from_dict, stored))
        for scaling in scalings:
            self._scale(scaling)
        return scalings

    def take_back(self) -> None:
        """Give the model its own float values back, to the bit; no plan may be on."""
        self._floats.give_back()

    def _scale(self, scaling: Scaling) -> None:
        """Scale a chain, and keep what was there before the first scaling."""
        self._floats.keep(scaling.chain)
        scale(self._model, scaling)

    def _reached(self) -> list[Chain]:
        """Return the chains whose tensor calibration saw; none where batches took branches."""
        if self._data.branches and self._wanted:
            _log.info("batches take different branches: no channels are rescaled")
            self._refuse_lost(self._wanted, (), "calibration batches take different branches")
            return []
        reached = [c for c in self._wanted if self._channels[c.consumers[0]].count]
        lost = [c for c in self._wanted if c not in reached]
        self._refuse_lost(lost, (), "calibration saw no finite value of it")
        return reached

    def _refuse_lost(
        self, chains: Iterable[Chain], done: Iterable[Scaling], why: str | None
    ) -> None:
        """Raise SpaceError where what a rule asks for was not done; None for what it cannot do."""
        scaled = {scaling.chain for scaling in done}
        for chain in chains:
            asked = self._wanted[chain]
            if asked is not None and chain not in scaled:
                names = tuple(map(name_of, asked))
                limits = _NO_CONSTANTS if BIAS_ABSORPTION in names else _NO_ROWS
                raise SpaceError(
                    f"{', '.join(chain.consumers)}: {' with '.join(names)} cannot scale the "
                    f"channels of this input, which {chain.producer!r} makes: {why or limits}. "
                    "Leave the recovery out"
                )

    def _calls(self, names: Sequence[str]) -> Calls:
        """Capture calls of the consumers on the first samples."""
        passes = GradientPass(self._model, self._data.feeder, self._seed)
        calls, _ = next(passes.parts(self._data.kept[0], _SAMPLES, names))
        return calls

    def _replace_ranges(self, scaling: Scaling, ranges: CalibratedRanges) -> None:
        statistics = self._channels[scaling.chain.consumers[0]]
        for name in scaling.chain.consumers:
            module = self._model.model.get_submodule(name)
            shifts = scaling.input_shifts(module)
            moved = statistics if shifts is None else statistics.shifted(shifts.float())
            ranges.replace(name, 0, moved.scaled(scaling.input_factors(module).float()))


def with_scalings(candidates: Candidates, scalings: Iterable[Scaling]) -> Candidates:
    """Return the candidates with the scaling of its input in the recovery of each."""
    repairs = {name: s.repairs for s in scalings for name in s.chain.consumers}
    return {
        name: [_repaired(option, repairs.get(name, ())) for option in options]
        for name, options in candidates.items()
    }


def _repaired(option: Candidate, repairs: Wanted) -> Candidate:
    others = tuple(r for r in option.config.recovery if name_of(r) not in SCALINGS)
    if option.config.is_float:
        return option
    recovery = in_order((*others, *repairs))
    config = option.config.model_copy(update={"recovery": recovery})
    return Candidate(option.label, config, option.given)


def _fixed(ranged: Operands) -> set[str]:
    """Return the ops with ranges that do not follow a scaling: of outputs, and along an axis."""
    return {
        name
        for name, statics in ranged.items()
        for index, scheme in statics
        if index == OUTPUT or not isinstance(scheme.granularity, PerTensor)
    }


def _asked(chain: Chain, candidates: Candidates) -> Wanted | None:
    """Return the scalings that rules ask for, () where they want none, None without rules."""
    asked: set[tuple[str | Repair, ...]] = set()
    for name in chain.consumers:
        for option in candidates.get(name, ()):
            if option.given and not option.config.is_float:
                asked.add(tuple(r for r in option.config.recovery if name_of(r) in SCALINGS))
    if len(asked) > 1:
        raise SpaceError(
            f"{', '.join(chain.consumers)}: the channels of their input are scaled for all options "
            "or for none, but rules ask for "
            f"{' and '.join(sorted(map(_spelled, asked)))}: give every option "
            "the same recovery"
        )
    return next(iter(asked), None)


def _spelled(repairs: Wanted) -> str:
    return " with ".join(map(str, repairs)) or "none"


def _refuse_vain(candidates: Candidates, chains: Iterable[Chain]) -> None:
    scaled = {name for chain in chains for name in chain.consumers}
    for name, options in candidates.items():
        for option in options:
            names = [name_of(r) for r in option.config.recovery if name_of(r) in SCALINGS]
            if names and name not in scaled:
                raise SpaceError(
                    f"{name}: {names[0]} has nothing to work on: the op must be a Linear or "
                    "convolution whose input comes from another one, or from a norm, through "
                    "nothing but ReLU, pooling, dropout or reshaping, and goes nowhere else. "
                    "Restrict the rule with names, or leave the recovery out"
                )
