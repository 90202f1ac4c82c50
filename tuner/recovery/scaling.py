"""Scaling of channels between a layer and what is before it: the function stays, ranges change."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.batches import Feeder
from tuner.errors import PlanError
from tuner.isolation import RandomState, isolated_random_state
from tuner.model import InstrumentedModel
from tuner.recovery.absorption import absorbed
from tuner.recovery.caps import cap
from tuner.recovery.chains import Chain
from tuner.recovery.float_values import FloatValues
from tuner.recovery.layers import (
    input_channels,
    on_input_channels,
    on_output_channels,
    output_axis,
)
from tuner.repairs import BIAS_ABSORPTION, Repair
from tuner.tensors import tensors_in

_TOLERANCE = 1e-4  # of the largest output: more than rounding does, less than a wrong factor


@dataclass(frozen=True, eq=False)
class Scaling:
    """The output x of a chain's producer becomes (x − shifts) / factors, on every channel.

    `repair` is where the factors `[channels]` come from, bias_absorption where all are 1; `shifts`
    `[channels]` are what the biases of the consumers take over, None for nothing. `gain` is how
    many times less damage that leaves in the options of the consumers, as predicted.
    """

    chain: Chain
    repair: str | Repair
    factors: Tensor
    gain: float = 1.0
    shifts: Tensor | None = None

    @property
    def repairs(self) -> tuple[str | Repair, ...]:
        """The repairs that this is, as plans have them."""
        both = self.shifts is not None and self.repair != BIAS_ABSORPTION
        return (self.repair, BIAS_ABSORPTION) if both else (self.repair,)

    def input_factors(self, module: nn.Module) -> Tensor:
        """Return the factors of a consumer's input channels: flattened ones repeat."""
        return self.factors.repeat_interleave(input_channels(module) // self.chain.channels)

    def input_shifts(self, module: nn.Module) -> Tensor | None:
        """Return the shifts of a consumer's input channels: flattened ones repeat."""
        repeats = input_channels(module) // self.chain.channels
        return None if self.shifts is None else self.shifts.repeat_interleave(repeats)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of JSON."""
        repair = self.repair if isinstance(self.repair, str) else self.repair.model_dump()
        chain = {
            "producer": self.chain.producer,
            "consumers": list(self.chain.consumers),
            "channels": self.chain.channels,
            "caps": list(self.chain.caps),
        }
        return {
            **chain,
            "repair": repair,
            "factors": self.factors.tolist(),
            "gain": self.gain,
            "shifts": None if self.shifts is None else self.shifts.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Scaling":
        """Read what `to_dict` wrote, in this version or before there were shifts."""
        chain = Chain(
            str(data["producer"]),
            tuple(data["consumers"]),
            int(data["channels"]),
            tuple(data["caps"]),
        )
        given = data["repair"]
        repair = given if isinstance(given, str) else Repair.model_validate(given)
        factors = torch.tensor(data["factors"], dtype=torch.float64)
        taken = data.get("shifts")
        shifts = None if taken is None else torch.tensor(taken, dtype=torch.float64)
        return cls(chain, repair, factors, float(data["gain"]), shifts)


@torch.no_grad()
def scale(model: InstrumentedModel, scaling: Scaling) -> None:
    """Scale and shift the channels of a chain, in place; no plan may be on."""
    root, chain = model.model, scaling.chain
    producer = root.get_submodule(chain.producer)
    changed = _divided(producer, scaling)
    for path in chain.consumers:
        changed |= _multiplied(root.get_submodule(path), path, scaling)
    for name, value in changed.items():
        parameter = root.get_parameter(name)
        parameter.data = value.to(parameter.dtype)
    model.weights.replace_originals({name: root.get_parameter(name).data for name in changed})
    for path in chain.caps:
        caps = _capped(root.get_submodule(path), chain, producer)
        caps.copy_(caps.double() / scaling.factors.to(caps.device).view(caps.shape))


def _divided(module: nn.Module, scaling: Scaling) -> dict[str, Tensor]:
    """Return the parameters of a producer whose channels are shifted and divided, by name."""
    changed = {}
    for name, parameter in module.named_parameters(recurse=False):
        whole = parameter.double()
        inverse = 1 / scaling.factors.to(whole.device)
        if name == "bias" and scaling.shifts is not None:
            whole = whole - scaling.shifts.to(whole.device)
        is_matrix = whole.dim() > 1
        scaled = on_output_channels(module, whole, inverse) if is_matrix else whole * inverse
        changed[_joined(scaling.chain.producer, name)] = scaled
    return changed


def _multiplied(module: nn.Module, path: str, scaling: Scaling) -> dict[str, Tensor]:
    """Return the parameters of a consumer that takes back what its input lost, by name."""
    weight = module.get_parameter("weight").double()
    factors, shifts = scaling.input_factors(module), scaling.input_shifts(module)
    changed = {_joined(path, "weight"): on_input_channels(module, weight, factors.to(weight))}
    if shifts is not None:
        bias = module.get_parameter("bias").double()
        changed[_joined(path, "bias")] = bias + absorbed(module, weight, shifts.to(weight))
    return changed


def _capped(module: nn.Module, chain: Chain, producer: nn.Module) -> Tensor:
    axis = output_axis(producer)
    assert axis is not None
    return cap(module, chain.channels, axis, producer.get_parameter("weight"))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def prepare_caps(model: nn.Module, scalings: Iterable[Scaling]) -> None:
    """Give the ReLU6 modules of scaled chains caps of each channel, the values left to come."""
    for scaling in scalings:
        chain = scaling.chain
        try:
            producer = model.get_submodule(chain.producer)
            modules = [model.get_submodule(path) for path in chain.caps]
        except AttributeError as error:
            raise PlanError(
                f"the channels after {chain.producer!r} were scaled, but this model lacks "
                f"{error}: it is a plan for another architecture"
            ) from error
        for module in modules:
            if not isinstance(module, nn.Hardtanh) or output_axis(producer) is None:
                raise PlanError(
                    f"the channels after {chain.producer!r} were scaled through a ReLU6, but they "
                    f"are a {type(producer).__name__} and a {type(module).__name__} here: it is a "
                    "plan for another architecture"
                )
            _capped(module, chain, producer)


class FunctionCheck:
    """Tells whether a model still computes what it did, on one batch.

    A model may use a tensor in ways that its recorded graph does not show.
    """

    def __init__(self, model: InstrumentedModel, feeder: Feeder, batch: Any) -> None:
        self._model = model
        self._feeder = feeder
        self._batch = batch
        self._random = RandomState.now()
        self._expected = self._outputs()

    def kept(self, scalings: Sequence[Scaling], floats: FloatValues) -> tuple[Scaling, ...]:
        """Return those of the scalings, which are on the model, that leave its function alone.

        The others are taken back; `floats` are the values from before the first of them.
        """
        if not scalings or self._holds():
            return tuple(scalings)
        floats.give_back()
        kept = []
        for scaling in scalings:
            before = FloatValues(self._model)
            before.keep(scaling.chain)
            scale(self._model, scaling)
            if self._holds():
                kept.append(scaling)
            else:
                before.give_back()
        return tuple(kept)

    def _holds(self) -> bool:
        outputs, expected = self._outputs(), self._expected
        if [x.shape for x in outputs] != [x.shape for x in expected]:
            return False
        return all(_close(x, y) for x, y in zip(outputs, expected, strict=True))

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        """Return the outputs, each time with the same random numbers."""
        with isolated_random_state():
            self._random.restore()
            found = tensors_in(self._feeder(self._model.model, self._batch))
        return [tensor.detach().clone() for tensor in found if tensor.is_floating_point()]


def _close(x: Tensor, y: Tensor) -> bool:
    """Return whether two outputs are the same but for rounding; NaN and ±inf where they were."""
    finite = y[torch.isfinite(y)].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(x, y, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True)
