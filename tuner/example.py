"""One call of a model as flat, named tensors: what an exported model takes and returns."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.batches import Feeder
from tuner.errors import ExportError, brief
from tuner.sites import own_class
from tuner.tensors import map_tensors, named_tensors_in

Axes = Mapping[str, Mapping[int, str] | Iterable[int]]
"""Input name → its axes whose length may change, with or without names for them."""


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The args and kwargs of a call."""


@dataclass(frozen=True, eq=False)
class Example:
    """A call of a model: its tensors in order, their names, and how the call is made of them."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    _call: Call

    @classmethod
    def of_call(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "Example":
        """Take a call apart; raises ExportError where it has no tensors."""
        positional = _parameter_names(model)
        found = [
            *_named("", dict(zip(_filled(positional, len(args)), args, strict=True))),
            *_named("", kwargs),
        ]
        if not found:
            raise ExportError("the example has no tensor: give the inputs of one call of the model")
        names, tensors = zip(*found, strict=True)
        kept = tuple(t.detach().clone() for t in tensors)
        return cls(_unique(names), kept, (tuple(args), dict(kwargs)))

    @classmethod
    def of_batch(
        cls, model: nn.Module, batch: Any, forward: Callable[[Any, Any], Any] | None = None
    ) -> "Example":
        """Return the call that a batch makes of the model, as calibration passes it."""
        with first_call(model) as calls, torch.no_grad():
            Feeder(model, forward)(model, batch)
        if not calls:
            raise ExportError("forward(model, batch) does not call the model: give example_inputs")
        return cls.of_call(model, *calls[0])

    def call(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs of the call with these tensors in the place of its own."""
        given = iter(tensors)
        call: Call = map_tensors(lambda _: next(given), self._call)
        return call

    def with_batch(self, size: int) -> "Example":
        """Return the example with another batch: first axes as long as that of the first tensor.

        They are cut or repeated.
        """
        now = self.batch
        tensors = tuple(_resized(t, size) if t.dim() and len(t) == now else t for t in self.tensors)
        return Example(self.names, tensors, self._call)

    @property
    def batch(self) -> int:
        """The length of the first axis of the first tensor that has one; 1 where none has."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), 1)

    def with_length(self, axes: Mapping[str, Iterable[int]], length: int) -> "Example":
        """Return the example with these axes, by input, cut or repeated to one length."""
        tensors = list(self.tensors)
        for index, name in enumerate(self.names):
            for axis in axes.get(name, ()):
                turned = tensors[index].transpose(0, axis)
                tensors[index] = _resized(turned, length).transpose(0, axis).contiguous()
        return Example(self.names, tuple(tensors), self._call)

    def tensors_to_trace(self) -> tuple[Tensor, ...]:
        """Return the tensors, contiguous, a batch of one doubled.

        Its length would be taken for a constant, and so would the order of others in memory.
        """
        firsts = {t.shape[0] for t in self.tensors if t.dim()}
        tensors = self.with_batch(2).tensors if firsts == {1} else self.tensors
        return tuple(tensor.contiguous() for tensor in tensors)

    def why_no_batch(self, run: Callable[..., Any]) -> str | None:
        """Return why `tensors_to_trace` fail, though the example's own are well: they are no batch.

        None where that is not so. `run` takes tensors as the model does.
        """
        doubled = self.tensors_to_trace()
        if [len(t) for t in doubled if t.dim()] == [len(t) for t in self.tensors if t.dim()]:
            return None
        try:
            run(*doubled)
        except Exception as error:  # the user's model may raise anything
            shown, wide = (
                ", ".join(str(list(t.shape)) for t in ts) for ts in (self.tensors, doubled)
            )
            return (
                f"the model takes example inputs of the shape {shown}, but not two of them, {wide} "
                f"({brief(error)}): their first axis is not that of a batch. Give "
                "one sample as a batch of one, x.unsqueeze(0), in the calibration data as well; a "
                "model that computes one sample at a time must be changed for an export"
            )
        return None

    def dynamic_axes(self, given: Axes | None = None) -> dict[str, dict[int, str]]:
        """Return the axes of each input whose length may change, with their names.

        Without `given`: the first axis of every input, the batch, and the second axis of token
        indices, the sequence, with that of masks of the same shape. Raises ExportError for an input
        or an axis that is not there.
        """
        if given is not None and not isinstance(given, Mapping):
            raise ExportError(
                f"dynamic_axes is a {type(given).__name__}: give a mapping of input names to axes, "
                f"such as {{{self.names[0]!r}: [0]}}"
            )
        if given is not None:
            return {name: self._checked(name, axes) for name, axes in given.items()}
        tokens = {tuple(t.shape[:2]) for t in self.tensors if t.dim() == 2 and not _is_float(t)}
        found: dict[str, dict[int, str]] = {}
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if tensor.dim():
                found[name] = {0: "batch"}
            if tensor.dim() == 2 and tuple(tensor.shape) in tokens:
                found[name][1] = "sequence"
        return found

    def _checked(self, name: str, axes: Mapping[int, str] | Iterable[int]) -> dict[int, str]:
        if name not in self.names:
            raise ExportError(
                f"dynamic_axes speaks of {name!r}: the model's inputs are {', '.join(self.names)}"
            )
        count = self.tensors[self.names.index(name)].dim()
        is_listed = isinstance(axes, Iterable) and not isinstance(axes, str)
        labels = axes.values() if isinstance(axes, Mapping) else ()
        are_numbers = is_listed and all(
            isinstance(axis, int) and not isinstance(axis, bool) for axis in axes
        )
        if not are_numbers or not all(isinstance(label, str) and label for label in labels):
            raise ExportError(
                f"dynamic_axes has {axes!r} for {name}: give the numbers of its axes, [0, 1], or "
                "names for them, {0: 'batch'}"
            )
        named = dict(axes) if isinstance(axes, Mapping) else {a: f"{name}_{a}" for a in axes}
        for axis in named:
            if not 0 <= axis < count:
                raise ExportError(f"dynamic_axes: {name} has {count} axes, and no axis {axis}")
        return named


@contextmanager
def first_call(model: nn.Module) -> Iterator[list[Call]]:
    """Yield a list that gets args and kwargs of the first call of the model in the block."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append((args, kwargs))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def outputs_of(value: Any) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Return names and tensors of what a model returns; a lone tensor is called 'output'.

    Raises ExportError where there is none.
    """
    found = list(named_tensors_in(value))
    if not found:
        raise ExportError(
            f"the model returns a {type(value).__name__} without tensors: only tensors, and "
            "tuples, mappings and dataclasses of them, can be exported"
        )
    names = [_output_name(name) for name, _ in found]
    return _unique(names), tuple(tensor for _, tensor in found)


def _output_name(name: str) -> str:
    clean = name.replace(".", "_")
    return "output" if not clean else f"output_{clean}" if clean[0].isdigit() else clean


def _parameter_names(model: nn.Module) -> list[str]:
    """Return the parameters of the model's forward, by name, as its user wrote it."""
    forward = model.__dict__.get("_tuner_forward") or model.__dict__.get("forward")
    try:
        names = list(inspect.signature(forward or own_class(model).forward).parameters)
    except (TypeError, ValueError):
        return []
    return names if forward else names[1:]


def _filled(names: list[str], count: int) -> list[str]:
    return [names[i] if i < len(names) else f"input_{i}" for i in range(count)]


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the tensors that `map_tensors` reaches, in its order."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, child in items:
            yield from _named(f"{name}_{key}" if name else str(key), child)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(unique)


def _resized(tensor: Tensor, size: int) -> Tensor:
    if not tensor.dim() or not len(tensor):
        return tensor
    repeats = -(-size // len(tensor))
    return tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:size].contiguous()


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
