"""The comparison of layers finds what a runtime gets wrong, and what it is for."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.onnx_nets import Exported, exported, floats, request
from tuner.exporters.onnx_file import OnnxModel
from tuner.exporters.onnx_layers import chaos, layer_agreement
from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.report import LayerAgreement

Run = Callable[[Sequence[Tensor]], list[Tensor]]


@pytest.fixture(scope="module")
def layers() -> Exported:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return exported(model, torch.randn(16, 6))


def compared(layers: Exported, wrong: Callable[[Tensor], Tensor]) -> dict[str, LayerAgreement]:
    """Compare with a runtime whose floats or codes come out wrong."""

    def load(model: OnnxModel) -> Run:
        run = model.load(OnnxRuntimeSession).run
        return lambda inputs: [wrong(tensor) for tensor in run(inputs)]

    found = layer_agreement(layers.fast, layers.graph.pairs, layers.traced, load)
    return {layer.name: layer for layer in found}


def test_a_right_runtime_is_within_a_step_everywhere(layers: Exported) -> None:
    found = compared(layers, lambda tensor: tensor)
    assert len(found) == 3  # two inputs and the output
    assert all(layer.max_steps <= 1 and layer.equal > 0.9 for layer in found.values())


def test_wrong_outputs_show(layers: Exported) -> None:
    found = compared(layers, lambda t: t * 1.1 if t.is_floating_point() else t)
    *inner, last = found.values()
    assert last.name == "output"
    assert last.max_steps == pytest.approx(12.7, rel=0.02)
    assert all(layer.max_steps <= 1 for layer in inner)


def test_wrong_codes_show_where_they_are(layers: Exported) -> None:
    found = compared(layers, lambda t: t if t.is_floating_point() else (t ^ 4))
    *inner, last = found.values()
    assert all(layer.max_steps == 4 and layer.equal == 0 for layer in inner)
    assert last.max_steps <= 1


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)))


def test_what_rounding_makes_of_the_last_bit_is_allowed_where_no_cut_stops_it(
    layers: Exported, tmp_path: Path
) -> None:
    assert chaos(layers.traced) == {}  # each quantized tensor is compared alone
    traced = request(deep(), floats(4096, 32), tmp_path, "fp8").traced
    allowed = chaos(traced)
    assert list(allowed) == list(traced.outputs)
    assert 0.1 < min(allowed.values()) < 100  # codes of e4m3fn are up to an eighth apart
