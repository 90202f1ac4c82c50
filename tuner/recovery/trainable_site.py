"""One op of a trainable model: its operands, weights, bias and output through their quantizers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tuner.ops import Family, Op, WeightRef
from tuner.qparams import compute_qparams, whole_scale
from tuner.recovery.learned import LearnedQuantizer
from tuner.recovery.trainable_bias import rounded_bias
from tuner.recovery.trainable_ranges import OwnQuantizer, RangeQuantizer
from tuner.schemes import OpConfig
from tuner.sites import Site, own_class

TrainableQuantizer = LearnedQuantizer | RangeQuantizer | OwnQuantizer


@dataclass(eq=False)
class Switch:
    """What all sites of a model share.

    `on` is False in the warm-up: then values pass as they are while the model trains. Where
    `observing`, they pass in any mode, and quantizers look at them. `ran` is set by each call in
    training mode: the next step of an optimizer counts.
    """

    on: bool = True
    observing: bool = False
    ran: bool = False


@dataclass(eq=False)
class Weight:
    """A weight of an op: which part of a parameter it is, under which name of the module."""

    ref: WeightRef
    name: str | None
    quantizer: TrainableQuantizer


@dataclass(eq=False)
class Parts:
    """The quantizers of one op: inputs by operand index, weights, output."""

    inputs: Mapping[int, TrainableQuantizer] = field(default_factory=dict)
    weights: tuple[Weight, ...] = ()
    output: TrainableQuantizer | None = None


class TrainableSite(Site):
    """Computes the calls of one op under its trainable quantizers.

    `owner` is the op's module, or the one that calls the function: its mode is the op's.
    """

    def __init__(
        self, op: Op, config: OpConfig, owner: nn.Module, parts: Parts, switch: Switch
    ) -> None:
        super().__init__(op.name)
        self.config = config
        self.owner = owner
        self.parts = parts
        self.switch = switch
        self.note = self._described
        self._weights = {w.ref.operand: w for w in parts.weights if w.ref.operand is not None}
        self._forward = own_class(owner).forward

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note": str, "_forward": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.note = self._described
        self._forward = own_class(self.owner).forward

    @property
    def rounds(self) -> bool:
        """True: a weight, an operand or the output is rounded."""
        return True

    def run(
        self, family: Family, fn: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Compute a call with everything of it rounded."""
        training = self.owner.training
        if training:
            self.switch.ran = True
        if self._passes(training):
            output = family.invoke(self.operand, fn, args, kwargs)
        else:
            output = family.invoke(self.operand, self._with_weights(fn), args, kwargs)
        if self.parts.output is None:
            return output
        if isinstance(output, Tensor):
            return self._through(self.parts.output, output)
        return (self._head(self.parts.output, output[0]), *output[1:])

    def _head(self, quantizer: TrainableQuantizer, head: Any) -> Any:
        """Round the sequence that a recurrent layer returns, packed or not."""
        if isinstance(head, PackedSequence):
            return head._replace(data=self._through(quantizer, head.data))
        return self._through(quantizer, head)

    def operand(self, index: int, x: Tensor) -> Tensor:
        """Round an operand of the call, also where it is a parameter."""
        weight = self._weights.get(index)
        if weight is not None:
            return self._rounded_parameter(weight, x)
        quantizer = self.parts.inputs.get(index)
        return x if quantizer is None else self._through(quantizer, x)

    def splits(self, index: int) -> bool:
        """Return False: quantizers look at whole tensors."""
        return False

    def _passes(self, training: bool) -> bool:
        return self.switch.observing or (training and not self.switch.on)

    def _through(self, quantizer: TrainableQuantizer, x: Tensor) -> Tensor:
        training = self.owner.training
        if training or self.switch.observing:
            quantizer.observe(x)
        return x if self._passes(training) else quantizer(x)

    def _rounded_parameter(self, weight: Weight, x: Tensor) -> Tensor:
        if self._passes(self.owner.training):
            return x
        if weight.ref.transposed:
            return weight.quantizer(x.t()).t()  # type: ignore[no-any-return]
        return weight.quantizer(x)  # type: ignore[no-any-return]

    def _with_weights(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return what the module computes, its own weights rounded."""
        named = [weight for weight in self.parts.weights if weight.name is not None]
        if not named and self.config.bias is None:
            return fn
        values = {str(w.name): w.quantizer(getattr(self.owner, str(w.name))) for w in named}
        if self.config.bias is not None:
            bias = getattr(self.owner, "bias")  # noqa: B009
            values["bias"] = rounded_bias(bias, self.config, self._bias_steps)
        return partial(self._forward, _View(self.owner, values))

    def _bias_steps(self) -> Tensor:
        """Return input scale × weight scale, in fp64."""
        inputs = self.parts.inputs[0].qparams()
        (weight,) = self.parts.weights
        assert inputs is not None
        assert self.config.weight is not None
        found = weight.quantizer.qparams()
        if found is None:
            found = compute_qparams(getattr(self.owner, str(weight.name)), self.config.weight)
        steps = torch.as_tensor(whole_scale(found)).double()
        return torch.as_tensor(inputs.scale).double() * steps

    def _described(self) -> str:
        inputs = ((f"input {i}", quantizer) for i, quantizer in self.parts.inputs.items())
        weights = (("weight", weight.quantizer) for weight in self.parts.weights[:1])
        named = [*weights, *inputs, *([("output", self.parts.output)] if self.parts.output else [])]
        texts = (f"{name} {q.extra_repr() or q.scheme.format}" for name, q in named)
        return "; ".join(texts)


class _View:
    """A module as its own forward sees it, some of its parameters exchanged."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._module = module
        for name, value in values.items():
            setattr(self, name, value)
        if isinstance(module, nn.RNNBase):
            names = module._flat_weights_names
            self._flat_weights = [values.get(name, getattr(module, name)) for name in names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)
