"""Whether a traced graph computes what the model does: twice, and at other lengths of its axes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tuner.errors import ExportError
from tuner.example import Axes, Example, outputs_of
from tuner.exporters.tracing import Traced, trace
from tuner.model import InstrumentedModel

GROSS = 0.1
"""Of the largest output: what no rounding does, but a branch that was not taken."""

_AGAIN = 1e-3
"""Of the largest output, when the same model runs on the same inputs."""

_SMALLEST = 1e-4
"""Of the largest of all outputs: one that is smaller may be nothing but what rounding left."""


def faithful_trace(
    model: InstrumentedModel, example: Example, dynamic_axes: Axes | None = None
) -> Traced:
    """Return a trace that computes as the model does, also at other lengths of its free axes.

    An axis that is free by default, at another length of which the model computes otherwise, is
    fixed. Raises ExportError where such an axis was asked for, where the model gives other outputs
    when it is called again, and what `trace` raises.
    """
    twin = model.copy()
    expected = _outputs(twin, example)
    if apart(expected, _outputs(twin, example), _AGAIN):
        raise ExportError(
            "the model gives other outputs when it is called again with the same inputs: it draws "
            "random numbers (F.dropout without training=self.training?) or keeps state in its "
            "buffers, which no exported file does. Mend its forward"
        )
    traced = trace(model, example, dynamic_axes)
    if apart(expected, traced.simulate(*example.tensors)):
        raise ExportError(
            "the traced model computes otherwise than the model itself: something in its forward "
            "changes from call to call, or leaves torch for Python or numpy. Mend its forward"
        )
    for label, probe in probes(traced):
        if not _differs(twin, traced, probe):
            continue
        lengths = ", ".join(f"{n} {list(t.shape)}" for n, t in named(probe))
        if dynamic_axes is not None:
            raise ExportError(
                f"dynamic_axes: the model computes otherwise where the axis {label!r} has another "
                f"length ({lengths}): its forward branches on that. Leave the axis out, or mend "
                "the model"
            )
        kept = {n: {a: at for a, at in axes.items() if at != label} for n, axes in _axes(traced)}
        return faithful_trace(model, example, kept)
    return traced


def probes(traced: Traced) -> Iterator[tuple[str, Example]]:
    """Yield the example with each free axis at other lengths, and the name of the axis."""
    example = traced.example
    for label in dict.fromkeys(at for _, axes in _axes(traced) for at in axes.values()):
        held = {n: [a for a, at in axes.items() if at == label] for n, axes in _axes(traced)}
        lengths = {t.shape[axis] for name, t in named(example) for axis in held.get(name, ())}
        if len(lengths) != 1:
            continue
        (now,) = lengths
        is_first = any(0 in axes for axes in held.values())
        for length in (1, now + 1) if is_first else (-(-now // 2),):
            if length != now and now:
                yield label, example.with_length(held, length)


def named(example: Example) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an example with their names."""
    yield from zip(example.names, example.tensors, strict=True)


def apart(expected: Sequence[Tensor], found: Sequence[Tensor], most: float = GROSS) -> str | None:
    """Say how outputs are others than expected; None where they are not.

    `most` is the largest difference that counts for nothing, as a share of an output's reach.
    """
    if len(expected) != len(found):
        return f"{len(found)} outputs instead of {len(expected)}"
    triples = zip(expected, found, reaches(expected), strict=True)
    for index, (e, f, reach) in enumerate(triples):
        if e.shape != f.shape:
            return f"output {index} has shape {list(f.shape)} instead of {list(e.shape)}"
        wanted, actual = e.double(), f.double()
        is_finite = wanted.isfinite() & actual.isfinite()
        if not e.numel() or not is_finite.any():
            continue
        difference = (wanted - actual)[is_finite].abs().max().item()
        if difference > most * reach:
            return f"output {index} is {difference:.3g} apart"
    return None


def reaches(outputs: Sequence[Tensor]) -> list[float]:
    """Return the largest finite magnitude of each output, by which its differences are judged.

    No less than 1e-4 of the largest one of all outputs: what cancels up to rounding is no size.
    """
    own = [_largest(output) for output in outputs]
    floats = (at for at, output in zip(own, outputs, strict=True) if output.is_floating_point())
    least = _SMALLEST * max(floats, default=0.0)
    return [
        max(at, least) if output.is_floating_point() else at
        for at, output in zip(own, outputs, strict=True)
    ]


def _largest(output: Tensor) -> float:
    values = output.double()
    values = values[values.isfinite()]
    return values.abs().max().item() if values.numel() else 0.0


def _axes(traced: Traced) -> list[tuple[str, dict[int, str]]]:
    return [(name, dict(axes)) for name, axes in traced.dynamic.items()]


def _differs(model: InstrumentedModel, traced: Traced, probe: Example) -> bool:
    try:
        expected = _outputs(model, probe)
    except Exception:  # what the model itself cannot take, nobody can ask of its trace
        return False
    try:
        return apart(expected, traced.simulate(*probe.tensors)) is not None
    except Exception:  # a shape that the trace took for a constant
        return True


@torch.no_grad()
def _outputs(model: InstrumentedModel, example: Example) -> tuple[Tensor, ...]:
    args, kwargs = example.call([tensor.clone() for tensor in example.tensors])
    return outputs_of(model.model(*args, **kwargs))[1]
