"""A model with its ops reached: runs taps over data, puts plans on in place and takes them off."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tuner.bias_corrections import BiasCorrections
from tuner.biases import BiasStore
from tuner.errors import PlanError
from tuner.granularity import PerTensor
from tuner.graph import MacCounter, OpGraph, Recorder
from tuner.norm_statistics import NormStatistics
from tuner.operands import OUTPUT, operand_shape
from tuner.ops import FAMILY_OF_MODULE, Family, Op, WeightRef
from tuner.qparams import QParams
from tuner.quantizer import Quantizer
from tuner.repairs import BN_REESTIMATION
from tuner.schemes import OpConfig, TensorScheme
from tuner.sites import Runtime, Tap, own_class, swap, unswap
from tuner.slices import along_axis
from tuner.weights import WeightStore

_FLOAT = OpConfig.float()


class Ranges(Protocol):
    """Knows the quantization parameters of activations."""

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Return the parameters of an operand (OUTPUT for the output) under a static scheme.

        Scale and zero point are `[]` per tensor, otherwise `[slices]`.
        """


class InstrumentedModel:
    """A model of the user's class whose ops can be watched and quantized in place.

    The model passed in is changed: give a copy. `apply(plan)` touches only ops that differ from
    what is on; `apply({})` takes everything off, and leaves the model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.runtime = Runtime()
        self.weights = WeightStore(model)
        self.biases = BiasStore(model)
        self.corrections = BiasCorrections(model)
        self.norms = NormStatistics(model)
        self.ops: Mapping[str, Op] = {}
        self._ranges: Ranges | None = None
        self._current: dict[str, OpConfig] = {}
        self._quantizers: dict[tuple[str, int, TensorScheme], Quantizer] = {}
        self._op_modules, self._attention, self._scopes = _candidates(model)
        self._swapped: set[str] = set()

    def copy(self) -> "InstrumentedModel":
        """Return a copy with the same plan on; what computes from data is shared: it is large."""
        of_data = self.weights.rounder, self.corrections.correction, self.norms.reestimate
        return copy.deepcopy(self, {id(each): each for each in of_data})

    @property
    def candidates(self) -> tuple[str, ...]:
        """The paths of all modules that could be ops, called or not."""
        return (*self._op_modules, *self._attention)

    @contextmanager
    def watching(self, tap: Tap) -> Iterator[None]:
        """Reach every op and every call while the block runs, through the tap; no plan is on."""
        self.apply({})
        wanted = {*self._op_modules, *self._attention, *self._scopes}
        try:
            self._swap_to(wanted)
            self.runtime.tap = tap
            yield
        finally:
            self.runtime.tap = None
            self.runtime.sites.clear()
            self._swap_to(set())

    def record(self, run: Callable[[], Any], samples: int) -> OpGraph:
        """Record the op graph of `run()`, which calls the model once on this many samples."""
        recorder = Recorder(self.model)
        with torch.no_grad(), self.watching(recorder), MacCounter(recorder):
            output = run()
            return recorder.graph(output, samples)

    def module_ops(self) -> dict[str, Op]:
        """Return the ops that are modules, without running the model: no shapes, no MACs."""
        paths = {id(p): name for name, p in self.model.named_parameters()}
        ops = {}
        for name, family in self._op_modules.items():
            ops[name] = _module_op(name, self.model.get_submodule(name), family, paths)
        for path in sorted(self._attention):
            attention = self.model.get_submodule(path)
            ops.update(self.record(partial(_call_attention, attention), 1).ops)
        return ops

    def install(self, ops: Mapping[str, Op], ranges: Ranges) -> None:
        """Say which ops plans may speak of, and where activation ranges come from."""
        self.ops = dict(ops)
        self._ranges = ranges
        self._quantizers.clear()

    def apply(self, plan: Mapping[str, OpConfig]) -> None:
        """Put a plan on, in place; ops that it does not name are float."""
        unknown = [name for name in plan if name not in self.ops]
        if unknown:
            raise PlanError(
                f"the plan names {unknown[0]!r}, which is no op of this model "
                f"({len(unknown)} unknown of {len(plan)}): is it a plan for another architecture?"
            )
        self._refuse_untied(plan)
        names = dict.fromkeys((*self._current, *plan))
        changed = [n for n in names if plan.get(n, _FLOAT) != self._current.get(n, _FLOAT)]
        for name in changed:
            self._set(self.ops[name], plan.get(name, _FLOAT))
        if changed:
            self._swap_to(self._needed())
            configs = self._current.values()
            self.norms.set(any(BN_REESTIMATION in config.recovery for config in configs))

    def _refuse_untied(self, plan: Mapping[str, OpConfig]) -> None:
        schemes: dict[object, tuple[str, object]] = {}
        for name, op in self.ops.items():
            config = plan.get(name, _FLOAT)
            choice = config.weight, config.rounding if config.weight else None
            for ref in op.weights:
                other, known = schemes.setdefault(ref.key, (name, choice))
                if known != choice:
                    raise PlanError(
                        f"{other!r} and {name!r} share the weight {ref.path!r}, but the plan gives "
                        "it two schemes: give both ops the same one"
                    )

    def _set(self, op: Op, config: OpConfig) -> None:
        for ref in op.weights:
            self.weights.set(ref, config.weight, config.rounding)
        self.biases.set(op, _FLOAT, self.bias_scale)
        self.corrections.set(op, config)
        self.biases.set(op, config, self.bias_scale)
        if config.is_float:
            self._current.pop(op.name, None)
            self.runtime.sites.pop(op.name, None)
            return
        self._current[op.name] = config
        site = self.runtime.site(op.name)
        schemes = {i: config.input_scheme(i) for i in op.activations}
        site.inputs = tuple(
            self.quantizer(op, i, scheme) if (scheme := schemes.get(i)) is not None else None
            for i in range(op.operand_count)
        )
        site.output = None if config.output is None else self.quantizer(op, OUTPUT, config.output)
        site.note = partial(self._describe, op, config)

    def _describe(self, op: Op, config: OpConfig) -> str:
        parts = []
        if config.weight is not None and op.weights:
            scales = self.weights.scales(op.weights[0], config.weight)
            parts.append(f"weight {Quantizer(config.weight, QParams(scales)).describe()}")
        parts += [] if (bias := self.biases.describe(op)) is None else [bias]
        schemes = [(f"input {i}", i, config.input_scheme(i)) for i in op.activations]
        for name, index, scheme in (*schemes, ("output", OUTPUT, config.output)):
            if scheme is not None:
                qparams = self.qparams(op.name, index, scheme)
                parts.append(f"{name} {Quantizer(scheme, qparams).describe()}")
        return "; ".join(parts)

    def qparams(self, op: str, index: int, scheme: TensorScheme) -> QParams | None:
        """Return the static parameters of an operand, None where its values give them."""
        if not scheme.needs_range:
            return None
        assert self._ranges is not None
        return self._ranges.qparams(op, index, scheme)

    def quantizer(self, op: Op, index: int, scheme: TensorScheme) -> Quantizer:
        """Return the quantizer of an operand (OUTPUT for the output) under a scheme."""
        key = (op.name, index, scheme)
        if key not in self._quantizers:
            qparams, spelled = self.qparams(op.name, index, scheme), scheme
            if qparams is not None and not isinstance(scheme.granularity, PerTensor):
                spelled, qparams = along_axis(scheme, qparams, operand_shape(op, index))
            self._quantizers[key] = Quantizer(spelled, qparams)
        return self._quantizers[key]

    def bias_scale(self, op: Op, config: OpConfig) -> Tensor:
        """Return input scale × weight scale of an op, in fp64: the step of an int32 bias."""
        inputs = config.input_scheme(0)
        assert inputs is not None
        assert config.weight is not None
        qparams = self.quantizer(op, 0, inputs).qparams
        assert qparams is not None
        weight = self.weights.scales(op.weights[0], config.weight)
        return torch.as_tensor(qparams.scale).double() * weight.double()

    def _needed(self) -> set[str]:
        """Return the modules that must be swapped for what is on now."""
        needed: set[str] = set()
        for name in self._current:
            owner = name.rpartition("/")[0]
            if name in self._op_modules:
                needed.add(name)
            elif owner in self._attention:
                needed.add(owner)
            else:
                needed.update(self._scopes)
        return needed

    def _swap_to(self, wanted: set[str]) -> None:
        for path in self._swapped - wanted:
            unswap(self.model.get_submodule(path))
        for path in wanted - self._swapped:
            module = self.model.get_submodule(path)
            if path in self._op_modules:
                swap(module, "op", self.runtime, path, self._op_modules[path])
            else:
                kind = "attention" if path in self._attention else "scope"
                swap(module, kind, self.runtime, path)
        if bool(wanted) != bool(self._swapped):
            _set_fast_path(self.model, not wanted)
        self._swapped = set(wanted)


def _candidates(model: nn.Module) -> tuple[dict[str, Family], set[str], set[str]]:
    """Sort the model's modules: ops by family, attention to decompose, and scopes."""
    ops: dict[str, Family] = {}
    attention: set[str] = set()
    scopes: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or _inside(path, attention):
            continue
        family = _family_of(module)
        if family is not None:
            ops[path] = family
        elif _has_forward_of(module, nn.MultiheadAttention):
            attention.add(path)
        elif own_class(module).forward is not nn.Module.forward:
            scopes.add(path)
    return ops, attention, scopes


def _inside(path: str, parents: set[str]) -> bool:
    return any(not parent or path.startswith(f"{parent}.") for parent in parents)


def _has_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    if not isinstance(module, base) or "forward" in module.__dict__:
        return False
    return own_class(module).forward is base.forward


def _family_of(module: nn.Module) -> Family | None:
    """Return the family of a module that computes as its torch base class does."""
    for base, family in FAMILY_OF_MODULE.items():
        if _has_forward_of(module, base):
            names = family.weight_names(module)
            plain = all(module._parameters.get(name) is not None for name in names)
            return family if plain else None
    return None


def _module_op(name: str, module: nn.Module, family: Family, paths: Mapping[int, str]) -> Op:
    parameters = [module.get_parameter(weight) for weight in family.weight_names(module)]
    looks_up = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return Op(
        name=name,
        type=family.op_type,
        weights=tuple(WeightRef(paths[id(p)], family.channel_axis) for p in parameters),
        activations=() if looks_up else (0,),
        products=(),
        input_shapes=(),
        output_shape=(),
        parameters=sum(p.numel() for p in module.parameters(recurse=False)),
        by_default=family.by_default,
    )


def _call_attention(module: nn.Module) -> Any:
    """Call attention on zeros of the widths that it has."""
    assert isinstance(module, nn.MultiheadAttention)
    widths = module.embed_dim, module.kdim, module.vdim
    return module(*(module.out_proj.weight.new_zeros(1, 1, width) for width in widths))


def _set_fast_path(model: nn.Module, on: bool) -> None:
    """Switch the fused path of TransformerEncoder, which would bypass its layers silently."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _switch(module, "activation_relu_or_gelu", 0, on)
        elif isinstance(module, nn.TransformerEncoder):
            _switch(module, "use_nested_tensor", False, on)


def _switch(module: nn.Module, name: str, off: object, on: bool) -> None:
    kept = f"_tuner_{name}"
    if not on and kept not in module.__dict__ and hasattr(module, name):
        module.__dict__[kept] = getattr(module, name)
        setattr(module, name, off)
    elif on and kept in module.__dict__:
        setattr(module, name, module.__dict__.pop(kept))
