"""A trace that computes otherwise than the model is refused, or its axes are fixed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner import TuningConfig, quantization
from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.agreement import agreement
from tuner.exporters.probes import apart, faithful_trace, probes
from tuner.exporters.tracing import Traced
from tuner.quantized_model import QuantizedModel

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers, what is between them differs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def between(self, h: Tensor) -> Tensor:
        return h.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Dropping(Two):
    """Drops at random, in eval mode too."""

    def between(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5)


class Counting(Two):
    """Adds how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


class Branching(Two):
    """Doubles a batch of one, which its trace does not see."""

    def between(self, h: Tensor) -> Tensor:
        return h * 2 if not torch.compiler.is_exporting() and len(h) == 1 else h


class Pretending(Two):
    """Is another model while it is traced."""

    def between(self, h: Tensor) -> Tensor:
        return h.neg() if torch.compiler.is_exporting() else h


def tuned(model: nn.Module) -> QuantizedModel:
    torch.manual_seed(0)
    return quantization.fit(model.eval(), [X], config=TuningConfig())


def traced(model: nn.Module, axes: Any = None) -> Traced:
    found = tuned(model)
    return faithful_trace(found._parts.model, Example.of_batch(found.model, X), axes)


@pytest.mark.parametrize("kind", [Dropping, Counting])
def test_a_model_that_gives_other_outputs_each_time_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ExportError, match="other outputs when it is called again"):
        traced(kind())


def test_a_trace_that_computes_otherwise_is_refused() -> None:
    with pytest.raises(ExportError, match="the traced model computes otherwise"):
        traced(Pretending())


def test_an_axis_whose_length_the_model_branches_on_is_fixed() -> None:
    assert traced(Two()).dynamic == {"x": {0: "batch"}}
    assert traced(Branching()).dynamic == {"x": {}}


def test_such_an_axis_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(ExportError, match=r"axis 'x_0' has another length \(x \[1, 8\]\)"):
        traced(Branching(), {"x": [0]})


def test_probes_have_other_lengths_axis_by_axis() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.fc(self.embed(ids)) * mask[..., None]

    batch = {"ids": torch.ones(4, 6, dtype=torch.int64), "mask": torch.ones(4, 6)}
    torch.manual_seed(0)
    model = quantization.fit(Tokens().eval(), [batch], config=TuningConfig())
    graph = faithful_trace(model._parts.model, Example.of_batch(model.model, batch))
    shapes = [(at, [tuple(t.shape) for t in probe.tensors]) for at, probe in probes(graph)]
    assert shapes == [
        ("batch", [(1, 6)] * 2),
        ("batch", [(5, 6)] * 2),
        ("sequence", [(4, 3)] * 2),
    ]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ((X,), None),
        ((X + 1e-3,), None),
        ((X, X), "2 outputs instead of 1"),
        ((X[:2],), "output 0 has shape"),
        ((-X,), "output 0 is"),
    ],
)
def test_only_gross_differences_count(found: tuple[Tensor, ...], why: str | None) -> None:
    told = apart((X,), found)
    assert told is None if why is None else why in (told or "")


def test_what_cancels_is_judged_by_the_other_outputs() -> None:
    logits = torch.tensor([[2.0, -3.0]])
    nothing, noise = torch.tensor([[5.9e-8]]), torch.tensor([[-1.2e-7]])
    assert apart((logits, nothing), (logits, noise)) is None
    assert apart((logits, nothing), (logits, noise + 1e-3)) == "output 1 is 0.001 apart"
    # alone, and beside numbers that count something, it is the size that it has
    assert apart((nothing,), (noise,)) == "output 0 is 1.79e-07 apart"
    counts = torch.tensor([10**9])
    assert apart((counts, nothing), (counts, noise)) == "output 1 is 1.79e-07 apart"


class Cancelling(Two):
    """Gives beside its result what cancels up to rounding."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.softmax(-1).sum(-1) - 1


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_model_with_an_output_that_cancels_is_tuned_and_exported(
    target: str, tmp_path: Path
) -> None:
    config = TuningConfig(target=target)
    tuned = quantization.fit(Cancelling().eval(), [X], config=config)
    report = tuned.export(tmp_path / "out", target=target, batches=())
    assert report.agreement.argmax == 1.0
    assert report.agreement.floor > 0


def test_nodes_called_like_an_input_get_another_name() -> None:
    class Named(Two):
        def forward(self, relu: Tensor) -> Tensor:
            return self.b(self.a(relu).relu())

    found = traced(Named())
    names = [node.name for node in found.module.graph.nodes]
    assert found.example.names == ("relu",)
    assert "relu_within" in names
    assert len(set(names)) == len(names)
    assert torch.equal(found.simulate(X)[0], Named.forward(tuned(Named()).model, X))


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_floats_that_no_rounding_explains_are_refused(share: float) -> None:
    found = traced(Two())

    def shifted(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        (out,) = found.simulate(*inputs)
        return [out + share * out.abs().max()]

    if share < 0.5:
        assert agreement(found, shifted).max_abs > 0
        return
    with pytest.raises(ExportError, match=r"output 'output' is .* the runtime computes something"):
        agreement(found, shifted)


def test_booleans_are_compared_too() -> None:
    class Signs(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) > 0

    found = traced(Signs())
    assert agreement(found, lambda inputs: found.simulate(*inputs)).argmax is None
