"""Where calls are intercepted: live state of every op on a model, and the swap that reaches it.

A leaf module is reached by swapping its class, in place, for a subclass with another forward; a
functional call by a TorchFunctionMode that is active while an instrumented module runs. Names of
functional calls are `path/function:index`, counted anew at each call of the module at `path`.
The mode is not active where torch.utils.checkpoint computes a function again: that is refused.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from tuner.errors import SchemeError, UnsupportedError
from tuner.operands import OUTPUT, operand_name
from tuner.ops import FUNCTIONS, Family, Operand, multihead_attention
from tuner.quantizer import Quantizer
from tuner.subclasses import set_class, subclassed


@dataclass(frozen=True)
class Call:
    """One call of an op: what to call, with what, and how its operands are found."""

    family: Family
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: nn.Module | None = None

    def invoke(self, operand: Operand) -> Any:
        """Compute the call with every operand passed through `operand`."""
        return self.family.invoke(operand, self.fn, self.args, self.kwargs)


class Site:
    """The quantizers that sit on one op; `inputs` is indexed by operand.

    `note` tells what they are, for the model's repr; `calls` counts how often the op ran (in
    compiled code it says only that it did).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: tuple[Quantizer | None, ...] = ()
        self.output: Quantizer | None = None
        self.note: Callable[[], str] = str
        self.calls = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note": partial(str, self.note())}

    @property
    def rounds(self) -> bool:
        """Whether a call gives anything else than the function itself."""
        return self.output is not None or any(self.inputs)

    def operand(self, index: int, x: Tensor) -> Tensor:
        """Fake-quantize an operand, where a quantizer sits on it.

        Raises SchemeError where a static scheme has scales for an axis of another size.
        """
        if index >= len(self.inputs) or (quantizer := self.inputs[index]) is None:
            return x
        return self._quantized(quantizer, index, x)

    def splits(self, index: int) -> bool:
        """Return whether an operand may be fake-quantized in pieces."""
        quantizer = self.inputs[index] if index < len(self.inputs) else None
        return quantizer is None or quantizer.is_elementwise

    def run(
        self, family: Family, fn: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Compute a call as this site's quantizers say."""
        if torch.compiler.is_compiling():
            self.calls = 1  # reading it would be a guard, and each call compiled anew
        else:
            self.calls += 1
        output = family.compute(self.operand, self.splits, fn, args, kwargs)
        if self.output is None:
            return output
        if isinstance(output, Tensor):
            return self._quantized(self.output, OUTPUT, output)
        return (self._first(self.output, output[0]), *output[1:])

    def _first(self, quantizer: Quantizer, head: Any) -> Any:
        """Fake-quantize the sequence that a recurrent layer returns, packed or not."""
        if isinstance(head, PackedSequence):
            return head._replace(data=self._quantized(quantizer, OUTPUT, head.data))
        return self._quantized(quantizer, OUTPUT, head)

    def _quantized(self, quantizer: Quantizer, index: int, x: Tensor) -> Tensor:
        try:
            return quantizer(x)
        except SchemeError as error:
            raise SchemeError(f"{operand_name(self.name, index)}: {error}") from error


class Tap(Protocol):
    """Watches calls in a pass over data: records, calibrates, captures."""

    def run(self, site: Site, call: Call) -> Any:
        """Compute the call of an op and look at it."""

    def other(self, scope: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute any other torch function call."""


class _Frames(threading.local):
    """The running scopes, innermost last.

    They are path, calls by function (None: of no interest), and whether a backward may follow.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[str, dict[str, int] | None, bool]] = []
        self.owners: set[str] | None = None
        self.has_mode = False


class Runtime:
    """The sites of one model, and the module scopes that are running."""

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self.tap: Tap | None = None
        self.frames = _Frames()

    def __getstate__(self) -> dict[str, Any]:
        return {"sites": self.sites}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(Runtime().__dict__, **state)

    def site(self, name: str) -> Site:
        """Return the site of this name, made on first use."""
        return self.sites.setdefault(name, Site(name))

    def run(
        self,
        name: str,
        family: Family,
        fn: Callable[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        module: nn.Module | None = None,
    ) -> Any:
        """Compute a call at a site, through the tap where one is set."""
        if self.tap is not None:
            return self.tap.run(self.site(name), Call(family, fn, args, kwargs, module))
        site = self.sites.get(name)
        return fn(*args, **kwargs) if site is None else site.run(family, fn, args, kwargs)

    def run_function(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute a torch function call, as a site if it is one that can be quantized."""
        stack = self.frames.stack
        path, counts, trains = stack[-1] if stack else ("", None, False)
        if counts is None:
            return fn(*args, **kwargs)
        entry = FUNCTIONS.get(fn)
        if entry is None or not entry[1].accepts(args, kwargs):
            if self.tap is None:
                return fn(*args, **kwargs)
            return self.tap.other(path, fn, args, kwargs)
        index = counts.get(entry[0], 0)
        counts[entry[0]] = index + 1
        name = f"{path}/{entry[0]}:{index}"
        if trains and self.tap is None:
            self._refuse_recomputation(name)
        return self.run(name, entry[1], fn, args, kwargs)

    def _refuse_recomputation(self, name: str) -> None:
        site = self.sites.get(name)
        if site is None or not site.rounds or not _is_checkpointed():
            return
        raise UnsupportedError(
            f"{name} is called by a function under torch.utils.checkpoint, which would compute it "
            "again without quantization, and give wrong gradients: checkpoint an nn.Module whose "
            "forward makes this call, or do without checkpointing"
        )

    def scoped(
        self, path: str, training: bool, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a module's forward as the innermost scope.

        The mode, through which every torch function call is slower, starts where the first scope
        with sites does.
        """
        frames = self.frames
        stack = frames.stack
        if not stack:
            frames.owners = self._owners()
        is_owner = frames.owners is None or path in frames.owners
        stack.append((path, {} if is_owner else None, training and torch.is_grad_enabled()))
        depth = len(stack)
        try:
            if frames.has_mode or not is_owner:
                return forward(*args, **kwargs)
            return self._watched(forward, args, kwargs)
        finally:
            del stack[depth - 1 :]

    def _owners(self) -> set[str] | None:
        """Return the scopes whose function calls matter; None where a tap wants all."""
        if self.tap is not None:
            return None
        return {_owner(name) for name in self.sites if "/" in name}

    def _watched(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.frames.has_mode = True
        try:
            with _CallMode(self):
                return forward(*args, **kwargs)
        finally:
            self.frames.has_mode = False


def _is_checkpointed() -> bool:
    """Whether a function that the innermost scope has torch.utils.checkpoint call is running."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not Runtime.scoped.__code__:
        frame = frame.f_back
        if frame.f_globals is vars(torch.utils.checkpoint):
            return True
    return False


class _CallMode(TorchFunctionMode):
    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._runtime.run_function(func, args, kwargs or {})


class _Swapped:
    """Base of the mixins that take the place of a module's forward."""

    _tuner_kind: ClassVar[str]
    _tuner_base: ClassVar[type[nn.Module]]
    _tuner_runtime: Runtime
    _tuner_path: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        return (_remade, (self._tuner_kind, self._tuner_base), *reduced[2:])

    def extra_repr(self) -> str:
        base = self._tuner_base.extra_repr(self)  # type: ignore[arg-type]
        own = (s for n, s in self._tuner_runtime.sites.items() if _owner(n) == self._tuner_path)
        lines = [base, *(_note(site, self._tuner_path) for site in own)]
        return "\n".join(line for line in lines if line)


def _owner(site_name: str) -> str:
    return site_name.rpartition("/")[0] if "/" in site_name else site_name


def _note(site: Site, path: str) -> str:
    local = site.name.removeprefix(path).removeprefix("/")
    return f"{local}: {site.note()}" if local else site.note()


class _OpMixin(_Swapped):
    _tuner_kind = "op"
    _tuner_family: Family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = partial(self._tuner_base.forward, self)
        assert isinstance(self, nn.Module)
        call = self._tuner_path, self._tuner_family, base, args, kwargs, self
        runtime = self._tuner_runtime
        if not runtime.frames.has_mode:
            return runtime.run(*call)
        with torch._C.DisableTorchFunction():
            return runtime.run(*call)


class _ScopeMixin(_Swapped):
    _tuner_kind = "scope"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get("_tuner_forward")
        forward = own or partial(self._tuner_base.forward, self)
        assert isinstance(self, nn.Module)
        path, training = self._tuner_path, self.training
        return self._tuner_runtime.scoped(path, training, forward, args, kwargs)


class _AttentionMixin(_Swapped):
    _tuner_kind = "attention"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from_linear = FUNCTIONS[torch.nn.functional.linear][1]
        from_matmul = FUNCTIONS[torch.matmul][1]

        def site(part: str, fn: Callable[..., Any], *operands: Any) -> Any:
            family = from_matmul if fn is torch.matmul else from_linear
            name = f"{self._tuner_path}/{part}"
            return self._tuner_runtime.run(name, family, fn, operands, {})

        assert isinstance(self, nn.MultiheadAttention)
        with torch._C.DisableTorchFunction():
            return multihead_attention(self, site, *args, **kwargs)


_MIXINS: dict[str, type[_Swapped]] = {
    mixin._tuner_kind: mixin for mixin in (_OpMixin, _ScopeMixin, _AttentionMixin)
}
_classes: dict[tuple[str, type], type[nn.Module]] = {}


def swap(
    module: nn.Module, kind: str, runtime: Runtime, path: str, family: Family | None = None
) -> None:
    """Swap a module's class, in place, for a subclass of kind 'op', 'scope' or 'attention'."""
    unswap(module)
    base = type(module)
    state = {"_tuner_runtime": runtime, "_tuner_path": path, "_tuner_family": family}
    if "forward" in module.__dict__:
        state["_tuner_forward"] = module.__dict__.pop("forward")
    module.__dict__.update(state)
    set_class(module, _swapped_class(kind, base))


def _remade(kind: str, base: type[nn.Module]) -> nn.Module:
    """Make an empty module of a swapped class: what copy and pickle begin with."""
    swapped = _swapped_class(kind, base)
    return swapped.__new__(swapped)


def _swapped_class(kind: str, base: type[nn.Module]) -> type[nn.Module]:
    if (kind, base) not in _classes:
        mixin = _MIXINS[kind]
        members = {"_tuner_base": base, "forward": _signed(vars(mixin)["forward"], base)}
        _classes[kind, base] = subclassed(base, members, mixin)
    return _classes[kind, base]


def _signed(forward: Any, base: type[nn.Module]) -> Callable[..., Any]:
    """Return a copy of a mixin's forward that shows the parameters of a class's own."""
    copied: Any = FunctionType(forward.__code__, forward.__globals__, forward.__name__)
    try:
        copied.__signature__ = inspect.signature(base.forward)
    except (TypeError, ValueError):  # built in, or not a function
        return forward  # type: ignore[no-any-return]
    return copied  # type: ignore[no-any-return]


def unswap(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, _Swapped):
        set_class(module, type(module)._tuner_base)
        for name in ("_tuner_runtime", "_tuner_path", "_tuner_family"):
            module.__dict__.pop(name, None)
        if "_tuner_forward" in module.__dict__:
            module.__dict__["forward"] = module.__dict__.pop("_tuner_forward")


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class as the user wrote it."""
    return type(module)._tuner_base if isinstance(module, _Swapped) else type(module)
