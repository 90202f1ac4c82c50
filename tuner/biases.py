"""Quantized biases: which op may have one, in which steps it counts, and how it sits on a model.

An int32 bias counts in steps of input scale × weight scale, as integer arithmetic adds it to the
products (Jacob et al., CVPR 2018, section 2.4): b = code · s_in · s_w, one s_w per output channel.
A bias in any other format has a scale of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner import formats
from tuner.errors import PlanError
from tuner.granularity import PerChannel, PerTensor
from tuner.ops import Op
from tuner.packed_tensor import (
    StoredTensor,
    check_parts,
    pack_current,
    stored_qparams,
    unpack_tensor,
)
from tuner.qparams import compute_qparams, fake_quantize
from tuner.quantizer import Quantizer
from tuner.ranges import QParams
from tuner.schemes import OpConfig, TensorScheme

_OF_PRODUCTS = "int32"
_TYPES = ("Linear", "Conv", "ConvTranspose")

Scale = Callable[[Op, OpConfig], Tensor]
"""Returns input scale × weight scale of an op: one value, or one for each weight channel."""


def bias_name(op_name: str) -> str:
    """Return the name of the bias parameter of the module at this path."""
    return f"{op_name}.bias" if op_name else "bias"


def counts_products(config: OpConfig) -> bool:
    """Return whether a bias counts in steps of input scale × weight scale."""
    return config.bias is not None and config.bias.format == _OF_PRODUCTS


def can_correct(op: Op, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether an op is a layer with a bias parameter; `shapes` are those of parameters."""
    return op.type.rstrip("123d") in _TYPES and bias_name(op.name) in shapes


def bias_problem(op: Op, config: OpConfig, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return why an op cannot have the bias scheme of a configuration, None if it can.

    `shapes` are those of the model's parameters, by name.
    """
    if config.bias is None:
        return None
    if not can_correct(op, shapes):
        return (
            f"{op.name} ({op.type}) has no bias to quantize: OpConfig(bias=…) is for Linear, Conv "
            "and ConvTranspose modules with a bias parameter. Restrict the rule with op_types or "
            "names"
        )
    if not counts_products(config):
        return None
    why = _unfit_scale(op, config, config.bias, len(shapes.get(op.weights[0].path, (0, 0))))
    if why is None:
        return None
    return (
        f"{op.name} ({op.type}): an int32 bias counts in steps of input scale × weight scale, "
        f"which {why}. Or choose another format for the bias: that has a scale of its own"
    )


def _unfit_scale(op: Op, config: OpConfig, bias: TensorScheme, weight_axes: int) -> str | None:
    if not bias.symmetric:
        return "have no zero point: leave symmetric at True"
    weight, inputs = config.weight, config.input_scheme(0)
    if weight is None or not _is_plain_integer(weight):
        return f"needs an integer weight, got {_shown(weight)}"
    reach = weight.granularity
    per_output = isinstance(reach, PerChannel) and (
        reach.axis % weight_axes == op.weights[0].axis % weight_axes
    )
    if not per_output and not isinstance(reach, PerTensor):
        return f"needs one weight scale per output channel or tensor, got {reach!r}"
    if inputs is None or not _is_plain_integer(inputs):
        return f"needs an integer input, got {_shown(inputs)}"
    if inputs.is_dynamic:
        return "needs a static per-tensor input, got one whose scales follow from the data"
    if not isinstance(inputs.granularity, PerTensor):
        return f"needs one input scale for the whole tensor, got {inputs.granularity!r}"
    return None


def _is_plain_integer(scheme: TensorScheme) -> bool:
    fmt = formats.get(scheme.format)
    return fmt.kind == "int" and fmt.block is None


def _shown(scheme: TensorScheme | None) -> str:
    return "none" if scheme is None else scheme.format


@dataclass(eq=False)
class _Bias:
    """A bias that is on the model; `stored` are the parts that a loaded one came from."""

    parameter: nn.Parameter
    original: Tensor
    config: OpConfig
    scheme: TensorScheme
    qparams: QParams
    stored: StoredTensor | None = None


class BiasStore:
    """Puts fake-quantized biases on a model's parameters.

    As with weights, a parameter keeps its identity: only its storage (`.data`) is exchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._on: dict[str, _Bias] = {}

    def set(self, op: Op, config: OpConfig, scale: Scale) -> None:
        """Quantize the bias of an op as its configuration says, or give back its float values."""
        on = self._on.get(op.name)
        if on is not None and on.config == config:
            return
        if on is not None:
            parameter = self._on.pop(op.name).parameter
            parameter.data = on.original.to(parameter.device, parameter.dtype)
        if config.bias is not None:
            parameter = self._parameter(op, config)
            scheme, qparams = _grid(op, config, parameter, scale)
            self._on[op.name] = _Bias(parameter, parameter.data, config, scheme, qparams)
            parameter.data = _rounded(parameter.data, scheme, qparams)

    def adopt(self, op: Op, config: OpConfig, parts: StoredTensor, scale: Scale) -> None:
        """Take a bias that was quantized before (a loaded plan) as it is."""
        assert config.bias is not None
        parameter = self._parameter(op, config)
        if counts_products(config):
            scheme, qparams = _grid(op, config, parameter, scale)
            parts = {**parts, "scale": torch.as_tensor(qparams.scale)}
        check_parts(parts, config.bias, bias_name(op.name))
        if not counts_products(config):
            scheme, qparams = config.bias, stored_qparams(parts, config.bias)
        value = unpack_tensor(parts, scheme, tuple(parameter.shape), parameter.dtype)
        parameter.data = value.to(parameter.device)
        on = _Bias(parameter, parameter.data, config, scheme, qparams, parts)
        self._on[op.name] = on

    def stored(self, op: Op) -> tuple[str, StoredTensor]:
        """Return the parameter's name, and the parts to store of the bias as it is now.

        An int32 bias has no scale: that follows from the input's and the weight's.
        """
        on = self._on[op.name]
        whole = on.original.double() if counts_products(on.config) else on.original
        parts = pack_current(on.parameter.detach(), whole, on.scheme, on.qparams, on.stored)
        if counts_products(on.config):
            parts = {name: part for name, part in parts.items() if name != "scale"}
        return self.path(op), parts

    def path(self, op: Op) -> str:
        """Return the first name of the op's bias parameter."""
        bias = self._model.get_parameter(bias_name(op.name))
        return next(name for name, p in self._model.named_parameters() if p is bias)

    def describe(self, op: Op) -> str | None:
        """Return one line for people about the bias that is on, None if it is float."""
        on = self._on.get(op.name)
        return None if on is None else f"bias {Quantizer(on.scheme, on.qparams).describe()}"

    def _parameter(self, op: Op, config: OpConfig) -> nn.Parameter:
        shapes = {name: tuple(p.shape) for name, p in _all_parameters(self._model)}
        if (problem := bias_problem(op, config, shapes)) is not None:
            raise PlanError(problem)
        parameter = self._model.get_parameter(bias_name(op.name))
        for other, on in self._on.items():
            if on.parameter is parameter:
                raise PlanError(
                    f"{other!r} and {op.name!r} share one bias, which cannot be quantized twice: "
                    "give a bias scheme to neither"
                )
        return parameter


def _all_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return every parameter under all its names."""
    return list(model.named_parameters(remove_duplicate=False))


def _grid(op: Op, config: OpConfig, bias: Tensor, scale: Scale) -> tuple[TensorScheme, QParams]:
    assert config.bias is not None
    if not counts_products(config):
        return config.bias, compute_qparams(bias, config.bias)
    scheme = config.bias.model_copy(update={"granularity": PerChannel(0)})
    steps = scale(op, config).double().reshape(-1)  # a grouped transposed layer has one a group
    return scheme, QParams(steps.repeat(bias.numel() // max(steps.numel(), 1)))


def _rounded(bias: Tensor, scheme: TensorScheme, qparams: QParams) -> Tensor:
    """Round in fp64 where the steps are: 32-bit codes are exact there."""
    double = isinstance(qparams.scale, Tensor) and qparams.scale.dtype == torch.float64
    with torch.no_grad():
        value = fake_quantize(bias.double() if double else bias, scheme, qparams)
    return value.to(bias.dtype)
