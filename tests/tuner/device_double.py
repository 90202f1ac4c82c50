"""A device that is not the CPU, where there is no other: its tensors live in memory of the CPU.

It has the name `meta`, the only device beside the CPU that every build of torch knows. What the
CPU computes is what it computes, but tensors of both are never mixed where an accelerator would
refuse them, and what reads the memory of a tensor finds none.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_MOVES = {_aten.copy_.default, _aten._to_copy.default, _aten._local_scalar_dense.default}
_INDEXED = {
    *(_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default),
    *(_aten._unsafe_index.Tensor, _aten._index_put_impl_.default),
}
# element by element, but without CPU scalars on accelerators (TensorIterator's allow_cpu_scalars)
_ALL_THERE = {_aten.clamp.Tensor, _aten.clamp_.Tensor, _aten.lerp.Tensor, _aten.lerp_.Tensor}


class DeviceTensor(Tensor):
    """A tensor of the device: `inner` are its values."""

    inner: Tensor
    is_meta = False  # it has values

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.data_ptr, Tensor.tolist):  # an address to compare, and what a copy has
            return func(args[0].inner)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func == Tensor.data.__set__ and isinstance(args[0], DeviceTensor):  # type: ignore[attr-defined]
            args[0].inner = args[1].inner
        return out

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, dict(kwargs or {}))

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.inner, self.requires_grad, isinstance(self, torch.nn.Parameter))


class _Everywhere(TorchDispatchMode):
    """Lets calls without a tensor of the device make one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, dict(kwargs or {}))


@contextmanager
def device_double() -> Iterator[torch.device]:
    """Let tensors be made on the device, and moved to it, and from it."""
    with _Everywhere(), pytest.MonkeyPatch.context() as patch:
        for name in ("tensor", "as_tensor"):  # the only ones that fill memory of their own
            patch.setattr(torch, name, _moved_later(getattr(torch, name)))
        patch.setattr(Tensor, "new_tensor", _like)
        enabled = torch.is_autocast_enabled  # knows no device of this name
        patch.setattr(torch, "is_autocast_enabled", lambda d="cpu": d != DEVICE.type and enabled(d))
        yield DEVICE


def _moved_later(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, DeviceTensor) or device is None:
            return make(data, device=device, **options)
        return make(data, **options).to(device)

    return made


def _like(self: Tensor, data: Any, dtype: Any = None) -> Tensor:
    return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what an accelerator would, and refuse what it would refuse."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, DeviceTensor)]
    _check(func, args, tensors, there)
    asked = kwargs.get("device")
    is_there = bool(there) if asked is None else torch.device(asked) == DEVICE
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    generators = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Generator)]
    if is_there and generators:
        raise RuntimeError(f"{func}: expected a generator of {DEVICE}, found one of the CPU")
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func is _aten.copy_.default:
        return args[0]
    if (
        is_there and torch.Tag.inplace_view in func.tags
    ):  # t_() and the like: the same for the outer tensor
        with no_dispatch():
            func(*args, **kwargs)
    if not is_there:
        return out
    known = {id(t.inner): t for t in there}
    return tree_map(lambda t: _outer(t, known), out)


def _check(func: Any, args: Any, tensors: list[Tensor], there: list[Any]) -> None:
    if any(t.is_meta for t in tensors if not isinstance(t, DeviceTensor)):
        raise RuntimeError(f"{func}: a tensor without values, made outside of device_double()")
    if not there or len(there) == len(tensors) or func in _MOVES:
        return
    here = [t for t in tensors if not isinstance(t, DeviceTensor)]
    if func in _INDEXED and isinstance(args[0], DeviceTensor):
        values = args[2] if len(args) > 2 else None
        here = [values] if isinstance(values, Tensor) and values in here else []
    takes_scalars = torch.Tag.pointwise in func.tags and func not in _ALL_THERE
    writes_here = func._schema.is_mutable and not isinstance(args[0], DeviceTensor)
    if writes_here or any(t.ndim or not takes_scalars for t in here):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def _outer(value: Any, known: dict[int, DeviceTensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known.get(id(value)) if id(value) in known else DeviceTensor(value)


def _rebuilt(inner: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    made = DeviceTensor(inner)
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_(requires_grad)
