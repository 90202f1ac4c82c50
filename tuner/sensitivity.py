"""Predicted damage of every option of every op, without running the model once per option.

An option perturbs an op's output by Δ = Σ Δ_c, one Δ_c for each tensor that it quantizes (its
weight, each operand, its output). With g the gradient of the loss at that output (labels sampled
from the model itself), the predicted damage is ½ Σ (g·Δ)² per sample: the diagonal Fisher
approximation of the KL divergence from the float model. Because Δ is a sum, the Gram matrix
⟨g·Δ_c, g·Δ_d⟩ of the components gives every combination of them: the work grows with the number
of schemes, not with the number of options, and the model itself runs forward and backward once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuner.batches import Feeder
from tuner.biases import counts_products
from tuner.capture import CapturedCall
from tuner.gradients import GradientPass, output_errors
from tuner.granularity import PerTensor
from tuner.model import InstrumentedModel
from tuner.operands import OUTPUT, Static, operand_shape
from tuner.ops import Op
from tuner.recovery.layers import channel_axis
from tuner.repairs import BIAS_CORRECTION, ROUNDINGS
from tuner.schemes import OpConfig, TensorScheme
from tuner.slices import axis_length
from tuner.tensors import head_of

SAMPLES = 64
WEIGHT = -2
"""The component index of an op's weight; operands are ≥ 0, the output is OUTPUT."""
BIAS = -3
"""That of a bias with a scale of its own: an int32 bias is as exact as the products it joins."""

Treatment = tuple[str | None, bool]
"""How a weight is rounded (None: to nearest), and whether the bias makes up for its mean error."""

WEIGHT_TREATED: Mapping[Treatment, int] = {
    (None, False): WEIGHT,
    **{
        (name, corrected): BIAS - 1 - i
        for i, (name, corrected) in enumerate(
            [(None, True), *((n, c) for n in ROUNDINGS for c in (False, True))]
        )
    },
}
"""The component index of an op's weight by how it is treated."""

_TREATMENT = {index: treatment for treatment, index in WEIGHT_TREATED.items()}

Component = tuple[int, TensorScheme]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Gram matrices of one op's perturbations, from which any option's damage follows."""

    components: tuple[Component, ...]
    gram: Tensor

    def alone(self, component: Component) -> float:
        """Return the predicted damage of one component, the others in float."""
        position = self.components.index(component)
        return float(self.gram[position, position])

    def damage(self, op: Op, config: OpConfig) -> float:
        """Return the predicted damage of a configuration, 0 for float."""
        chosen = [self.components.index(c) for c in components_of(op, config)]
        return max(float(self.gram[chosen][:, chosen].sum()), 0.0)


def components_of(op: Op, config: OpConfig) -> list[Component]:
    """Return what a configuration quantizes on an op: (component index, scheme)."""
    pairs: list[tuple[int, TensorScheme | None]] = [
        (WEIGHT_TREATED[treatment_of(config)], config.weight if op.weights else None),
        *((i, config.input_scheme(i)) for i in op.activations),
        (OUTPUT, config.output),
        (BIAS, None if counts_products(config) else config.bias),
    ]
    return [(index, scheme) for index, scheme in pairs if scheme is not None]


def treatment_of(config: OpConfig) -> Treatment:
    """Return how a configuration treats the weight."""
    return config.rounding, config.corrects_bias


def config_of(scheme: TensorScheme, rounding: str | None, corrected: bool) -> OpConfig:
    """Return the configuration that does nothing but treat a weight so."""
    names = [] if rounding is None else [rounding]
    return OpConfig(weight=scheme, recovery=(*names, *([BIAS_CORRECTION] if corrected else ())))


class SensitivityAnalysis:
    """Measures the perturbations of every op under the schemes that a space may use."""

    def __init__(
        self,
        model: InstrumentedModel,
        feeder: Feeder,
        components: Mapping[str, Sequence[Component]],
        seed: int,
    ) -> None:
        self._model = model
        self._passes = GradientPass(model, feeder, seed)
        self._components = {name: tuple(c) for name, c in components.items() if c}
        self._sliced = {n: s for n, c in components.items() if (s := _sliced(c))}
        self._grams = {n: torch.zeros(len(c), len(c)) for n, c in self._components.items()}
        self._samples = 0

    def run(
        self, batches: Sequence[Any], late: Sequence[Any], advance: Callable[[], None]
    ) -> dict[str, Sensitivity]:
        """Return the sensitivity of every op from the first SAMPLES samples of the batches.

        `late` batches reached ops that the first ones did not: a slice of each is added.
        """
        for batch in batches:
            if self._samples < SAMPLES:
                self._measure(batch, SAMPLES - self._samples, advance)
        for batch in late:
            self._measure(batch, 1, advance)
        scale = 0.5 / max(self._samples, 1)
        return {n: Sensitivity(self._components[n], g * scale) for n, g in self._grams.items()}

    def _measure(self, batch: Any, samples: int, advance: Callable[[], None]) -> None:
        """Add slices of a batch until so many samples are in; the whole of it if it has no rows."""
        for calls, size in self._passes.parts(batch, samples, self._components, self._fit):
            self._add(calls, advance)
            self._samples += size

    def _fit(self, calls: Mapping[str, Sequence[CapturedCall]]) -> bool:
        """Return whether scales along an axis fit: where it holds samples, a part has too few."""
        for name, statics in self._sliced.items():
            op = self._model.ops[name]
            for captured in calls.get(name, ()):
                shapes = _shapes(captured)
                for index, scheme in statics:
                    shape, whole = shapes[index], operand_shape(op, index)
                    reach = scheme.granularity
                    if axis_length(shape, reach) != axis_length(whole, reach):
                        return False
        return True

    @torch.no_grad()
    def _add(self, calls: dict[str, list[CapturedCall]], advance: Callable[[], None]) -> None:
        for name in list(calls):
            for captured in calls.pop(name):
                self._grams[name] += self._gram(self._model.ops[name], captured)
            advance()

    def _gram(self, op: Op, captured: CapturedCall) -> Tensor:
        components = self._components[op.name]
        reference = head_of(captured.replay(lambda i, x: x)).float()
        perturbed: dict[Component, Tensor] = {}
        for component in components:
            found = self._shifted(op, captured, component, perturbed)
            if found is None:
                found = head_of(self._perturbed(op, captured, component)).float()
            perturbed[component] = found
        errors = output_errors(reference, captured.gradient, list(perturbed.values()))
        return (errors @ errors.T).cpu()

    def _shifted(
        self,
        op: Op,
        captured: CapturedCall,
        component: Component,
        known: Mapping[Component, Tensor],
    ) -> Tensor | None:
        """Return the output with a corrected bias from that without, None where it is not known."""
        index, scheme = component
        rounding, corrected = _TREATMENT.get(index, (None, False))
        plain = known.get((WEIGHT_TREATED[rounding, False], scheme))
        module = captured.call.module
        if not corrected or plain is None or module is None:
            return None
        config = config_of(scheme, rounding, corrected)
        shift = self._model.corrections.shift(op, config).to(plain)
        return plain + shift.view(-1, *[1] * (-1 - channel_axis(module)))

    def _perturbed(self, op: Op, captured: CapturedCall, component: Component) -> Any:
        index, scheme = component
        if index in _TREATMENT:
            return self._with_weight(op, captured, scheme, *_TREATMENT[index])
        if index == BIAS:
            return self._with_bias(op, captured, scheme)
        quantizer = self._model.quantizer(op, index, scheme)
        if index == OUTPUT:
            return quantizer(head_of(captured.replay(lambda i, x: x)))
        return captured.replay(lambda i, x: quantizer(x) if i == index else x)

    def _with_weight(
        self,
        op: Op,
        captured: CapturedCall,
        scheme: TensorScheme,
        rounding: str | None,
        corrected: bool,
    ) -> Any:
        weights = self._model.weights
        if captured.call.module is None:
            ref = op.weights[0]
            value = weights.quantized(ref, scheme, rounding)
            value = value.T if ref.transposed else value
            return captured.replay(lambda i, x: value if i == ref.operand else x)
        try:
            for ref in op.weights:
                weights.set(ref, scheme, rounding)
            if corrected:
                self._model.corrections.set(op, config_of(scheme, rounding, corrected))
            return captured.replay(lambda i, x: x)
        finally:
            self._model.corrections.set(op, OpConfig.float())
            for ref in op.weights:
                weights.set(ref, None)

    def _with_bias(self, op: Op, captured: CapturedCall, scheme: TensorScheme) -> Any:
        biases, scale = self._model.biases, self._model.bias_scale
        try:
            biases.set(op, OpConfig(bias=scheme), scale)
            return captured.replay(lambda i, x: x)
        finally:
            biases.set(op, OpConfig.float(), scale)


def _sliced(components: Sequence[Component]) -> tuple[Static, ...]:
    """Return the activations with static scales along an axis."""
    activations = ((i, s) for i, s in components if i >= OUTPUT and s.needs_range)
    return tuple((i, s) for i, s in activations if not isinstance(s.granularity, PerTensor))


def _shapes(captured: CapturedCall) -> dict[int, tuple[int, ...]]:
    """Return the shapes of a call's operands and of its output."""
    shapes: dict[int, tuple[int, ...]] = {}

    def look(index: int, x: Tensor) -> Tensor:
        shapes[index] = tuple(x.shape)
        return x

    return shapes | {OUTPUT: tuple(head_of(captured.replay(look)).shape)}
