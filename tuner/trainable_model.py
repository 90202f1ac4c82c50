"""A model that trains under its plan: TrainableModel, and what its optimizer gets."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tuner.batches import Feeder
from tuner.errors import TunerError
from tuner.example import Example
from tuner.model import InstrumentedModel
from tuner.operands import OUTPUT
from tuner.ops import WeightRef
from tuner.packed_tensor import pack_tensor, unpack_tensor
from tuner.plan import Plan
from tuner.quantized_model import QuantizedModel
from tuner.ranges import QParams, step_bounds
from tuner.recovery.folding import FoldedPair
from tuner.recovery.learned import LearnedQuantizer
from tuner.recovery.scaling import Scaling
from tuner.recovery.trainable_quantizers import Quantized
from tuner.recovery.trainable_site import Switch
from tuner.results import TuningResult
from tuner.saving import Parts
from tuner.schemes import TensorScheme


@dataclass(frozen=True, eq=False)
class LearnedRange:
    """What one tensor is quantized with: `operand` is `weight`, `input 0`, …, or `output`.

    Scale and zero point are shaped as the scheme has them; `min` and `max` are the ends of the
    range of each scale.
    """

    name: str
    operand: str
    bits: int
    scale: Tensor
    zero_point: Tensor
    min: Tensor
    max: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON: tensors as numbers, or lists of them."""
        tensors = ("scale", "zero_point", "min", "max")
        plain = {"name": self.name, "operand": self.operand, "bits": self.bits}
        return {**plain, **{name: getattr(self, name).tolist() for name in tensors}}


@dataclass(frozen=True, eq=False)
class TrainableParts:
    """What a trainable model is made of.

    `operands` says of each quantizer of which operand of which op, or of which weight, it is;
    `result` what is known of the plan before training.
    """

    model: InstrumentedModel
    plan: Plan
    folded: tuple[FoldedPair, ...]
    result: TuningResult
    quantizers: nn.ModuleDict
    operands: Mapping[str, Quantized]
    switch: Switch
    feeder: Feeder
    scalings: tuple[Scaling, ...] = ()
    example: Example | None = None


class TrainableModel(nn.Module):
    """A model of the user's class whose forward computes as its plan says, and that can train.

    `model` keeps its float weights as parameters under their own names; `quantizers` holds learned
    scales and running ranges. In training mode, values pass unrounded until `quant_start_step`
    optimizer steps are done; in eval mode they are always rounded. A step counts when an optimizer
    of torch.optim that holds a parameter of this model steps after a call in training mode; others
    are told of by `count_step()`.
    """

    steps: Tensor

    def __init__(self, parts: TrainableParts, quant_start_step: int = 0) -> None:
        super().__init__()
        self.model = parts.model.model
        self.quantizers = parts.quantizers
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.quant_start_step = quant_start_step
        self.accuracy: float | None = None
        self._parts = parts
        self._taken = 0
        self._note_steps(0)
        self.register_load_state_dict_post_hook(_note_loaded)  # type: ignore[no-untyped-call]
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _watch(self)

    @property
    def plan(self) -> Plan:
        """The plan that is simulated."""
        return self._parts.plan

    @property
    def is_quantizing(self) -> bool:
        """Whether the warm-up is over."""
        return self._parts.switch.on

    @property
    def is_ready(self) -> bool:
        """Whether every quantizer knows its range: else a batch in training mode must run first."""
        return all(quantizer.is_ready for quantizer in self.quantizers.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as if it were quantized."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def observe(self, batches: Iterable[Any]) -> None:
        """Let quantizers look at batches, unrounded and in eval mode, as if in training."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        self._parts.switch.observing = True
        try:
            for batch in batches:
                self.feed(batch)
        finally:
            self._parts.switch.observing = False
            for module, mode in modes.items():
                module.training = mode

    def feed(self, batch: Any) -> Any:
        """Call the model on a batch as fit() would."""
        return self._parts.feeder(self.model, batch)

    def count_step(self) -> None:
        """Count an optimizer step; those of torch.optim are counted without this."""
        self.steps.add_(1)
        self._note_steps(self._taken + 1)

    def scales(self) -> dict[str, nn.Parameter]:
        """Return the learned scales and offsets by their names in the state_dict."""
        found = self.quantizers.named_parameters()
        return {f"quantizers.{name}": parameter for name, parameter in found}

    def learned_ranges(self) -> list[LearnedRange]:
        """Return bits, scale and range of every tensor whose scale is learned or averaged."""
        return list(self._ranges())

    @torch.no_grad()
    def to_quantized(self) -> QuantizedModel:
        """Return a QuantizedModel of this plan with the weights and ranges as they are now.

        Its outputs are those of this model in eval mode, also after save() and load(). Raises
        DataError where an activation has no range yet.
        """
        twin = copy.deepcopy(self._parts.model)
        twin.apply({})
        frozen = InstrumentedModel(twin.model)
        frozen.install(self._parts.model.ops, _Frozen(self))
        for ref, quantizer in self._learned_weights():
            weight = frozen.weights.original(ref)
            stored = pack_tensor(weight, quantizer.scheme, quantizer.qparams())
            value = unpack_tensor(stored, quantizer.scheme, tuple(weight.shape), weight.dtype)
            frozen.weights.adopt(ref, value, quantizer.scheme, stored)
        frozen.apply(self.plan)
        frozen.weights.forget_cache()
        frozen.model.eval()
        parts = self._parts
        found = Parts(
            model=frozen,
            plan=self.plan,
            folded=parts.folded,
            result=self._result(),
            scalings=parts.scalings,
            example=parts.example,
        )
        return QuantizedModel(found)

    def _result(self) -> TuningResult:
        """Return how the plan was found, its record judged by the accuracy after training."""
        result = self._parts.result
        meets_goal = None
        if self.accuracy is not None and result.baseline is not None:
            meets_goal = result.goal.violation(self.accuracy, result.baseline) <= 0
        best = replace(
            result.best,
            plan=Plan({**result.best.plan, **self.plan}),
            accuracy=self.accuracy,
            metrics={},
            meets_goal=meets_goal,
            reason=f"{result.best.reason}, trained for {int(self.steps)} steps",
            scores=None,
        )
        return replace(result, best=best)

    def _learned_weights(self) -> Iterator[tuple[WeightRef, LearnedQuantizer]]:
        for key, (_, operand) in self._parts.operands.items():
            quantizer = self.quantizers[key]
            if isinstance(operand, WeightRef) and isinstance(quantizer, LearnedQuantizer):
                yield operand, quantizer

    def _ranges(self) -> Iterator[LearnedRange]:
        for key, (op, operand) in self._parts.operands.items():
            quantizer: Any = self.quantizers[key]
            qparams = quantizer.qparams() if quantizer.is_ready else None
            if qparams is None:
                continue
            scheme = quantizer.scheme
            name = operand.path if isinstance(operand, WeightRef) else op
            yield _range(name, _operand(operand), scheme, qparams)

    def _note_steps(self, taken: int) -> None:
        self._taken = taken
        self._parts.switch.ran = False
        self._parts.switch.on = taken >= self.quant_start_step

    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._parts.switch.ran:
            return
        mine = {id(parameter) for parameter in self.parameters()}
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            self.count_step()


def parameter_groups(
    model: TrainableModel, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return groups for an optimizer: weights, other parameters, and learned scales.

    Weight decay is for parameters of two axes and more. `scale_lr` None stands for `lr` / 10.
    """
    if not isinstance(model, TrainableModel):
        raise TunerError(
            f"model is a {type(model).__name__}: give what prepare_qat() returned, a TrainableModel"
        )
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    scales = [scale for scale in model.scales().values() if scale.requires_grad]
    slow = lr / 10 if scale_lr is None else scale_lr
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": scales, "lr": slow, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Frozen:
    """The ranges of activations as a trainable model has them."""

    def __init__(self, model: TrainableModel) -> None:
        self._known: dict[tuple[str, int], QParams | None] = {}
        for key, (op, operand) in model._parts.operands.items():
            if isinstance(operand, int):
                quantizer: Any = model.quantizers[key]
                self._known[op, operand] = _detached(quantizer)

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Return the parameters of an operand."""
        found = self._known[op, operand]
        assert found is not None
        return found


def _detached(quantizer: Any) -> QParams | None:
    quantizer.check_ready()
    found = quantizer.qparams()
    if found is None:
        return None
    scale, zero_point = (
        value.detach().clone() if isinstance(value, Tensor) else value
        for value in (found.scale, found.zero_point)
    )
    return QParams(scale, zero_point)


def _range(name: str, operand: str, scheme: TensorScheme, qparams: QParams) -> LearnedRange:
    scale = torch.as_tensor(qparams.scale).detach().clone()
    ends = (torch.as_tensor(end, device=scale.device) for end in step_bounds(scheme, qparams))
    low, high = (end * scale for end in ends)
    zero = 0 if qparams.zero_point is None else qparams.zero_point
    zero_point = torch.as_tensor(zero, dtype=torch.int32, device=scale.device).expand(scale.shape)
    return LearnedRange(name, operand, scheme.bits, scale, zero_point.clone(), low, high)


def _operand(operand: int | WeightRef) -> str:
    if isinstance(operand, WeightRef):
        return "weight"
    return "output" if operand == OUTPUT else f"input {operand}"


def _note_loaded(model: TrainableModel, incompatible: object) -> None:
    model._note_steps(int(model.steps))


_LIVE: WeakSet[TrainableModel] = WeakSet()


def _watch(model: TrainableModel) -> None:
    _LIVE.add(model)
    _register()


@cache
def _register() -> None:
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
    for model in tuple(_LIVE):
        model._after_step(optimizer)
