"""Compares what an artifact gives with the simulated model, on real inputs."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.disturbance import NOISE, Disturbance
from tuner.exporters.probes import GROSS, apart, named, probes, reaches
from tuner.exporters.report import Agreement, LayerAgreement
from tuner.exporters.tracing import Traced

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Runs an artifact on the flat inputs of a traced model, and returns its flat outputs."""

AS_FAR = 3.0
"""How many times as far as seen once what rounding makes may be: the largest of it varies."""

_FAR = 0.5
"""Of an output's reach: what is so far apart on the example itself is not rounding,"""

_MANY = 10
"""unless it is less than so many times the floor."""

_SEEDS = 3
_LEVELS = 127


@torch.no_grad()
def agreement(traced: Traced, run: Run) -> Agreement:
    """Run an artifact and the simulation on the example, and compare their outputs.

    Raises ExportError where the artifact gives other outputs than the model: in number, in shape,
    NaN, or floats that no rounding explains; where it changes its inputs; and where it is grossly
    off at other lengths of free axes.
    """
    inputs = traced.example.tensors
    expected = traced.simulate(*inputs)
    before = [tensor.clone() for tensor in inputs]
    found = list(run(inputs))
    _check_inputs(traced, before)
    _check(traced, expected, found)
    if (why := apart(found, run(inputs))) is not None:
        raise ExportError(f"the artifact gives other outputs when it is run again: {why}")
    pairs = [_floats(e, f) for e, f in zip(expected, found, strict=True)]
    differences = [(f - e).abs() for e, f in pairs if e.numel()]
    count = sum(d.numel() for d in differences)
    largest = max((d.max().item() for d in differences), default=0.0)
    floor = perturbation_floor(traced, expected)
    _check_values(traced, expected, pairs, floor)
    for label, probe in probes(traced):
        _check_at(traced, run, label, probe, AS_FAR * max(floor, largest))
    return Agreement(
        max_abs=largest,
        mean_abs=sum(d.sum().item() for d in differences) / max(count, 1),
        argmax=_same_argmax(expected[0], found[0]),
        floor=floor,
        samples=traced.example.batch,
    )


def perturbation_floor(traced: Traced, expected: Sequence[Tensor]) -> float:
    """Return how far the simulation's outputs move when quantized tensors are disturbed by 1e-6."""
    worst = 0.0
    for moved in disturbed_outputs(traced):
        for one, other in zip(expected, moved, strict=True):
            if one.numel():
                e, m = _floats(one, other)
                worst = max(worst, (m - e).abs().max().item())
    return worst


def disturbed_outputs(traced: Traced) -> Iterator[Sequence[Tensor]]:
    """Yield the simulation's outputs on the example under several disturbances of 1e-6.

    What runtimes round last are the outputs: they are disturbed, too.
    """
    for seed in range(_SEEDS):
        disturb = Disturbance(NOISE, seed)
        moved = traced.simulation(NOISE, seed).run(*traced.example.tensors)
        yield [disturb(output) for output in moved]


def output_steps(
    traced: Traced, expected: Sequence[Tensor], found: Sequence[Tensor]
) -> Iterator[LayerAgreement]:
    """Yield how far each output of floats is apart: a step is 1/127 of its reach."""
    rows = zip(traced.outputs, expected, found, reaches(expected), strict=True)
    for name, e, f, reach in rows:
        if e.is_floating_point() and e.numel():
            wanted, actual = _floats(e, f)
            step = reach / _LEVELS if e.isfinite().any() else 1.0
            steps = (actual - wanted).abs() / max(step, 1e-30)
            equal = (steps < 1 / _LEVELS).double().mean().item()
            yield LayerAgreement(name, steps.max().item(), equal)


def _floats(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in fp64, equal infinities (of masks) left out."""
    a, b = one.double(), other.double()
    same = a == b
    return torch.where(same, 0.0, a), torch.where(same, 0.0, b)


def _same_argmax(expected: Tensor, found: Tensor) -> float | None:
    if (
        expected.dtype == torch.bool
        or expected.dim() < 2
        or expected.shape[-1] < 2
        or not expected.numel()
    ):
        return None
    return (expected.argmax(-1) == found.argmax(-1)).double().mean().item()


def _check_inputs(traced: Traced, before: Sequence[Tensor]) -> None:
    for (name, now), old in zip(named(traced.example), before, strict=True):
        if not torch.equal(old, now) and not old.isnan().any():
            raise ExportError(f"the artifact overwrites its input {name!r}")


def _check_at(traced: Traced, run: Run, label: str, probe: Example, allowed: float) -> None:
    """Raise ExportError where an artifact cannot run at other lengths as its trace does.

    Differences up to `allowed` say nothing of lengths: there are such on the example itself.
    """
    try:
        expected = traced.simulate(*probe.tensors)
    except Exception:  # nor does the model take that length: its trace computes as it does
        return
    largest = max((e.double().abs().max().item() for e in expected if e.numel()), default=0.0)
    try:
        why = apart(expected, run(probe.tensors), max(GROSS, allowed / max(largest, 1e-30)))
    except Exception as error:  # each runtime has exceptions of its own
        why = str(error)
    if why is None:
        return
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named(probe))
    raise ExportError(
        f"the artifact is wrong where the axis {label!r} has another length ({shapes}): {why}. "
        "Give dynamic_axes without that axis"
    )


def _check_values(
    traced: Traced, expected: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], floor: float
) -> None:
    """Raise ExportError where outputs are much further apart than disturbances move them."""
    rows = zip(traced.outputs, expected, pairs, reaches(expected), strict=True)
    for name, output, (wanted, found), reach in rows:
        if not output.is_floating_point() or not output.numel():
            continue
        difference = (found - wanted).abs().max().item()
        if difference > max(_FAR * reach, _MANY * floor):
            raise ExportError(
                f"the artifact's output {name!r} is {difference:.3g} from the simulation, whose "
                f"largest value is {reach:.3g}, and a disturbance of 1e-6 moves it by {floor:.3g}: "
                "the runtime computes something else"
            )


def _check(traced: Traced, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    if len(expected) != len(found):
        raise ExportError(f"the artifact has {len(found)} outputs, the model {len(expected)}")
    for name, e, f in zip(traced.outputs, expected, found, strict=True):
        if e.shape != f.shape:
            raise ExportError(
                f"the artifact's output {name!r} has shape {list(f.shape)}, the model's "
                f"{list(e.shape)}"
            )
        if f.isnan().any() and not e.isnan().any():
            raise ExportError(f"the artifact's output {name!r} has NaN, the model's has none")
