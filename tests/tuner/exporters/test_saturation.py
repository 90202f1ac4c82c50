"""8-bit codes are multiplied exactly on every CPU, VNNI or not."""

import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.errors import ExportError
from tuner.exporters.targets import exporter
from tuner.quantized_model import QuantizedModel

_CPU_INFO = Path("/proc/cpuinfo")
W8 = TensorScheme(format="int8", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)
STATIC = OpConfig(weight=W8, inputs=A8)
TARGETS = ("onnx", "onnxruntime", "openvino", "torch")
X = torch.ones(2, 64, 6, 6)


class Largest(nn.Module):
    """Sums of the largest products that there are: all weights and inputs are their range's end."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(64, 64, 3)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.head = nn.Linear(64, 8)
        with torch.no_grad():
            for layer in (self.dense, self.depthwise, self.head):
                layer.weight.fill_(1 / layer.weight[0].numel())
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.dense(x)).mean((2, 3)))


def fit(target: str | None = None, **space: object) -> QuantizedModel:
    config = TuningConfig(target=target, space=SearchSpace(**space))
    return quantization.fit(Largest().eval(), [X], config=config)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not _CPU_INFO.exists(), reason="tells CPUs by Linux on x86"
)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_saturate_on_x86_without_vnni(target: str) -> None:
    flags = next(line for line in _CPU_INFO.read_text().splitlines() if line.startswith("flags"))
    has_vnni = {"avx512_vnni", "avx_vnni"} & set(flags.split())
    expected = target != "onnx" and not has_vnni
    assert exporter(target).saturates == expected


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_of_no_target_is_computed_exactly(target: str, tmp_path: Path) -> None:
    """Where sums saturate, they are half of what they should be."""
    report = fit().export(tmp_path / "model", target=target, example_inputs=X, batches=())
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-2  # the outputs are 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_report_tells_where_weights_overflow(target: str, tmp_path: Path) -> None:
    """On this CPU, or on others that the file may be taken to; a package stays where it is."""
    report = fit().export(tmp_path / "model", target=target, example_inputs=X, batches=())
    told = [*report.notes, *(f"{left.op}: {left.reason}" for left in report.left_float)]
    here = any("this CPU's kernels" in text for text in told)
    elsewhere = any("x86 CPUs without VNNI" in text for text in told)
    saturates = exporter("onnxruntime" if target == "onnx" else target).saturates
    assert (here, elsewhere) == (saturates, not saturates and target != "torch")


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_a_tuned_plan_have_7_bits_where_kernels_saturate(target: str) -> None:
    plan = fit(target).plan
    weights = {name: plan[name].weight for name in ("dense", "depthwise", "head")}
    reduced = {name: w is not None and w.reduce_range for name, w in weights.items()}
    saturates = exporter(target).saturates
    assert reduced == {"dense": saturates, "depthwise": False, "head": saturates}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "torch"])
def test_a_tuned_plan_is_computed_with_integers(target: str, tmp_path: Path) -> None:
    report = fit(target).export(tmp_path / "model", target=target, example_inputs=X, batches=())
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert not any("reduce_range" in left.reason for left in report.left_float)
    is_slower = [note for note in report.notes if "slower" in note]
    assert not is_slower


class Turned(nn.Module):
    """Weights that are used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.full((64, 64), 1 / 64))
        self.second = nn.Parameter(torch.full((64, 64), 1 / 64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x @ self.first.t(), self.second.t())


@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_are_turned_are_multiplied_exactly(target: str, tmp_path: Path) -> None:
    x = torch.ones(2, 64)
    model = quantization.fit(Turned().eval(), [x], config=TuningConfig())
    report = model.export(tmp_path / "model", target=target, example_inputs=x, batches=())
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-2


class Product(nn.Module):
    """A product of two activations, the first of which is not negative."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) @ x.mT


def test_openvino_multiplies_no_activations_that_overflow(tmp_path: Path) -> None:
    x = torch.ones(2, 16, 64)

    def exported(second: TensorScheme) -> float:
        rule = Rule(op_types=["matmul"], options=[OpConfig(inputs=(A8, second))])
        space = SearchSpace(rules=[rule])
        model = quantization.fit(Product().eval(), [x], config=TuningConfig(space=space))
        path = tmp_path / second.model_dump_json()[:40].replace("/", "")
        report = model.export(path, target="openvino", example_inputs=x, batches=())
        assert report.agreement is not None
        return report.agreement.max_abs

    signed = TensorScheme(format="int8")
    if exporter("openvino").saturates:
        with pytest.raises(ExportError, match="give input 1 reduce_range=True"):
            exported(signed)
    else:
        assert exported(signed) < 1e-2
    assert exported(signed.model_copy(update={"reduce_range": True})) < 1
