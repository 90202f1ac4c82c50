"""Predicted damage of every option of every op, without running the model once per option.

An option perturbs an op's output by Δ = Σ Δ_c, one Δ_c for each tensor that it quantizes (its
weight, each operand, its output). With g the gradient of the loss at that output (labels sampled
from the model itself), the predicted damage is ½ Σ (g·Δ)² per sample: the diagonal Fisher
approximation of the KL divergence from the float model. Because Δ is a sum, the Gram matrix
⟨g·Δ_c, g·Δ_d⟩ of the components gives every combination of them: the work grows with the number
of schemes, not with the number of options, and the model itself runs forward and backward once.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tuner.batches import Feeder, batch_size
from tuner.biases import counts_products
from tuner.capture import Capture, CapturedCall, surrogate_loss
from tuner.granularity import PerTensor
from tuner.model import InstrumentedModel
from tuner.operands import OUTPUT, Static, operand_shape
from tuner.ops import Op
from tuner.schemes import OpConfig, TensorScheme
from tuner.slices import axis_length
from tuner.tensors import map_tensors

_log = logging.getLogger(__name__)

SAMPLES = 64
_SLICE = 32
WEIGHT = -2
"""The component index of an op's weight; operands are ≥ 0, the output is OUTPUT."""
BIAS = -3
"""That of a bias with a scale of its own: an int32 bias is as exact as the products it joins."""

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
        (WEIGHT, config.weight if op.weights else None),
        *((i, config.input_scheme(i)) for i in op.activations),
        (OUTPUT, config.output),
        (BIAS, None if counts_products(config) else config.bias),
    ]
    return [(index, scheme) for index, scheme in pairs if scheme is not None]


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
        self._feeder = feeder
        self._components = {name: tuple(c) for name, c in components.items() if c}
        self._sliced = {n: s for n, c in components.items() if (s := _sliced(c))}
        self._grams = {n: torch.zeros(len(c), len(c)) for n, c in self._components.items()}
        self._generator = torch.Generator().manual_seed(seed)
        self._samples = 0
        sizes = (m.num_embeddings for m in model.model.modules() if isinstance(m, nn.Embedding))
        self._vocabularies = frozenset(sizes)

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
        for part, size in _slices(batch):
            if samples <= 0:
                return
            calls = self._tried(part, gradients=True)
            if calls is None or not self._fit(calls):  # no parts of batches, or no gradients
                calls = self._tried(batch, gradients=True) or self._captured(batch, False)
                size = samples = batch_size(batch)
            self._add(calls, advance)
            self._samples += size
            samples -= size

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

    def _tried(self, batch: Any, gradients: bool) -> dict[str, list[CapturedCall]] | None:
        try:
            return self._captured(batch, gradients)
        except Exception as error:  # the user's model may raise anything on a slice
            _log.debug("the model refused a part of a calibration batch: %s", error)
            return None

    def _captured(self, batch: Any, gradients: bool) -> dict[str, list[CapturedCall]]:
        """Run the model forward and backward on a batch; gradients stay None where impossible."""
        model = self._model.model
        capture = Capture(self._components)
        needed = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            with torch.set_grad_enabled(gradients), self._model.watching(capture), _quiet():
                output = self._feeder(model, batch)
                loss = surrogate_loss(output, batch, self._vocabularies, self._generator)
                if loss is not None:
                    self._backward(loss)
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(needed[name])
        return capture.calls

    def _backward(self, loss: Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            _log.warning(
                "no gradients can be had (%s): predicted damage falls back to output errors",
                str(error).splitlines()[0],
            )

    @torch.no_grad()
    def _add(self, calls: dict[str, list[CapturedCall]], advance: Callable[[], None]) -> None:
        for name in list(calls):
            for captured in calls.pop(name):
                self._grams[name] += self._gram(self._model.ops[name], captured)
            advance()

    def _gram(self, op: Op, captured: CapturedCall) -> Tensor:
        components = self._components[op.name]
        reference = _head(captured.replay(lambda i, x: x)).float()
        if captured.gradient is None:  # the output error, relative to the output
            weight = reference.square().sum().div(max(reference.shape[0], 1)).rsqrt()
        else:
            weight = captured.gradient.float()
        rows = []
        for component in components:
            perturbed = _head(self._perturbed(op, captured, component)).float()
            rows.append((perturbed - reference).mul_(weight).flatten())
        stacked = torch.nan_to_num(torch.stack(rows))
        return (stacked @ stacked.T).cpu()

    def _perturbed(self, op: Op, captured: CapturedCall, component: Component) -> Any:
        index, scheme = component
        if index == WEIGHT:
            return self._with_weight(op, captured, scheme)
        if index == BIAS:
            return self._with_bias(op, captured, scheme)
        quantizer = self._model.quantizer(op, index, scheme)
        if index == OUTPUT:
            return quantizer(_head(captured.replay(lambda i, x: x)))
        return captured.replay(lambda i, x: quantizer(x) if i == index else x)

    def _with_weight(self, op: Op, captured: CapturedCall, scheme: TensorScheme) -> Any:
        weights = self._model.weights
        if captured.call.module is None:
            ref = op.weights[0]
            value = weights.quantized(ref, scheme)
            value = value.T if ref.transposed else value
            return captured.replay(lambda i, x: value if i == ref.operand else x)
        try:
            for ref in op.weights:
                weights.set(ref, scheme)
            return captured.replay(lambda i, x: x)
        finally:
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
    activations = ((i, s) for i, s in components if i not in (WEIGHT, BIAS) and s.needs_range)
    return tuple((i, s) for i, s in activations if not isinstance(s.granularity, PerTensor))


def _shapes(captured: CapturedCall) -> dict[int, tuple[int, ...]]:
    """Return the shapes of a call's operands and of its output."""
    shapes: dict[int, tuple[int, ...]] = {}

    def look(index: int, x: Tensor) -> Tensor:
        shapes[index] = tuple(x.shape)
        return x

    return shapes | {OUTPUT: tuple(_head(captured.replay(look)).shape)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch says of models that look at their values, which they may."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")
        yield


def _head(output: Any) -> Tensor:
    head = output if isinstance(output, Tensor) else output[0]
    head = head if isinstance(head, Tensor) else head.data  # a PackedSequence
    assert isinstance(head, Tensor)
    return head


def _slices(batch: Any) -> Iterator[tuple[Any, int]]:
    """Yield (part, samples): runs of the rows of every tensor that has one row a sample."""
    size = batch_size(batch)
    if size <= _SLICE:
        yield batch, size
        return
    for start in range(0, size, _SLICE):
        rows = slice(start, min(start + _SLICE, size))
        part = map_tensors(partial(_rows, size=size, rows=rows), batch)
        yield part, rows.stop - rows.start


def _rows(tensor: Tensor, size: int, rows: slice) -> Tensor:
    return tensor[rows] if tensor.dim() and tensor.shape[0] == size else tensor
