"""The quantizers that a plan asks for, as modules that train with the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tuner import formats
from tuner.errors import DataError, ModelError, PlanError
from tuner.granularity import PerTensor
from tuner.kernels import codec_of, parameter_shape
from tuner.model import InstrumentedModel
from tuner.operands import OUTPUT, operand_name, operand_shape
from tuner.ops import Op, WeightRef
from tuner.ranges import QParams
from tuner.recovery.learned import LearnedQuantizer
from tuner.recovery.lsq import can_learn
from tuner.recovery.trainable_ranges import OwnQuantizer, RangeQuantizer
from tuner.recovery.trainable_site import Parts, Switch, TrainableQuantizer, TrainableSite, Weight
from tuner.schemes import OpConfig, TensorScheme
from tuner.slices import slice_count

Method = Literal["qat", "lsq", "lsq+"]
Start = Literal["calibrated", "lsq"]
KnownRange = Callable[[str, int, TensorScheme], QParams | None]
"""Returns the calibrated parameters of an operand (OUTPUT: the output), None without any."""

KnownWeight = Callable[[WeightRef, TensorScheme], QParams]
"""Returns the parameters that a weight is quantized with before it is trained."""

Quantized = tuple[str, int | WeightRef]
"""An op, and its operand (OUTPUT for the output) or a weight of it."""

_UNTOUCHED = OpConfig(output=TensorScheme(format="fp32"))


@dataclass(frozen=True, eq=False)
class Known:
    """What is known before training: parameters of activations and of weights."""

    activation: KnownRange
    weight: KnownWeight


@dataclass(frozen=True)
class Choices:
    """How the quantizers of a model train, and where they start."""

    method: Method = "qat"
    init: Start = "lsq"
    ema_decay: float = 0.99


class QuantizerTable:
    """Makes the quantizers of a plan, and puts them on a model's ops.

    `quantizers` holds each under its own name: `layer1/0/conv1:input0`, `fc:output`, and weights
    `weight:fc/weight` by their parameter; tied weights have one.
    """

    def __init__(self, model: InstrumentedModel, choices: Choices, known: Known) -> None:
        self.quantizers = nn.ModuleDict()
        self.operands: dict[str, Quantized] = {}
        self._model = model
        self._choices = choices
        self._known = known
        self._parameters = dict(model.model.named_parameters())

    def install(self, plan: Mapping[str, OpConfig], switch: Switch) -> None:
        """Let the calls of all ops of a plan run through quantizers.

        Raises PlanError where the plan is for another architecture.
        """
        quantized = {name: config for name, config in plan.items() if not config.is_float}
        # a plan that leaves every value as it is: it swaps the modules that are needed
        self._model.apply(dict.fromkeys(quantized, _UNTOUCHED))
        self._refuse_untied(plan)
        for name, config in quantized.items():
            op, owner = self._model.ops[name], self._owner(name)
            site = TrainableSite(op, config, owner, self._parts(op, config, owner), switch)
            self._model.runtime.sites[name] = site

    def _owner(self, name: str) -> nn.Module:
        path = name.rpartition("/")[0] if "/" in name else name
        return self._model.model.get_submodule(path)

    def _parts(self, op: Op, config: OpConfig, owner: nn.Module) -> Parts:
        schemes = {i: config.input_scheme(i) for i in op.activations}
        inputs = {i: self._activation(op, i, s) for i, s in schemes.items() if s is not None}
        output = None if config.output is None else self._activation(op, OUTPUT, config.output)
        weights: tuple[Weight, ...] = ()
        if config.weight is not None:
            weights = tuple(self._weight(op, ref, owner, config.weight) for ref in op.weights)
        return Parts(inputs, weights, output)

    def _activation(self, op: Op, index: int, scheme: TensorScheme) -> TrainableQuantizer:
        quantizer = self._new_activation(op, index, scheme)
        operand = "output" if index == OUTPUT else f"input{index}"
        self._add(f"{op.name}:{operand}", quantizer, op.name, index)
        return quantizer

    def _new_activation(self, op: Op, index: int, scheme: TensorScheme) -> TrainableQuantizer:
        if not scheme.needs_range:
            return OwnQuantizer(scheme)
        known = self._known.activation(op.name, index, scheme)
        shape = _slices(op, index, scheme)
        if self._choices.method == "qat":
            average = RangeQuantizer(scheme, shape, self._choices.ema_decay)
            if known is not None:
                average.initialize(known)
            return average
        learned = LearnedQuantizer(scheme, shape, False, self._choices.method == "lsq+")
        if known is not None and self._choices.init == "calibrated":
            learned.initialize(known)
        return learned

    def _weight(self, op: Op, ref: WeightRef, owner: nn.Module, scheme: TensorScheme) -> Weight:
        rows = "" if ref.rows is None else f"[{ref.rows[0]}:{ref.rows[1]}]"
        key, parameter = _key(f"weight:{ref.path}{rows}"), self._parameters[ref.path]
        if getattr(owner, "sparse", False):
            raise ModelError(
                f"{op.name!r} has sparse gradients, which pass no rounding: make it with "
                "sparse=False, or leave its weight in float"
            )
        if key not in self.quantizers:
            self._add(key, self._new_weight(ref, ref.of(parameter), scheme), op.name, ref)
        own = owner.named_parameters(recurse=False, remove_duplicate=False)
        name = None if ref.operand is not None else next(n for n, p in own if p is parameter)
        return Weight(ref, name, self.quantizers[key])  # type: ignore[arg-type]

    def _new_weight(
        self, ref: WeightRef, weight: Tensor, scheme: TensorScheme
    ) -> TrainableQuantizer:
        if self._choices.method == "qat" or not can_learn(scheme):
            return OwnQuantizer(scheme)
        shape = parameter_shape(tuple(weight.shape), scheme.reach)
        learned = LearnedQuantizer(scheme, shape, True, self._choices.method == "lsq+")
        if self._choices.init == "calibrated":
            learned.initialize(self._known.weight(ref, scheme))
        else:
            learned.observe(weight)
        return learned

    def _add(
        self, name: str, quantizer: TrainableQuantizer, op: str, operand: int | WeightRef
    ) -> None:
        scheme = quantizer.scheme
        for fmt in filter(None, (scheme.format, scheme.backward_format)):
            codec_of(formats.get(fmt))  # made now: torch.compile would compile anew for it
        key = _key(name)
        self.quantizers[key] = quantizer
        self.operands[key] = op, operand

    def _refuse_untied(self, plan: Mapping[str, OpConfig]) -> None:
        schemes: dict[object, tuple[str, TensorScheme | None]] = {}
        for name, op in self._model.ops.items():
            scheme = plan[name].weight if name in plan else None
            for ref in op.weights:
                other, known = schemes.setdefault(ref.key, (name, scheme))
                if known != scheme:
                    raise PlanError(
                        f"{other!r} and {name!r} share the weight {ref.path!r}, but the plan gives "
                        "it two schemes: give both ops the same one"
                    )


def _slices(op: Op, index: int, scheme: TensorScheme) -> tuple[int, ...]:
    """Return the shape of an activation's scale: `[]`, or `[slices]`."""
    if isinstance(scheme.granularity, PerTensor):
        return ()
    if not op.output_shape:
        raise DataError(
            f"{operand_name(op.name, index)}: how many scales {scheme.granularity!r} has must come "
            "from data: give calib_dataloader, or a scheme with PerTensor()"
        )
    return (slice_count(operand_shape(op, index), scheme.granularity),)


def _key(name: str) -> str:
    """Return a name that a ModuleDict takes."""
    return name.replace(".", "/")
