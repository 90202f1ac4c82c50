"""The target `integer`: what it writes runs without torch, and gives what the simulation gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import tuner
from tests.tuner.exporters.integer_nets import (
    A8,
    INT8,
    W8,
    Net,
    exported,
    fitted,
    graph_of,
    image,
    net,
    rules,
    tokens,
    words,
)
from tuner import OpConfig, PerChannel, TensorScheme
from tuner.errors import ExportError
from tuner.exporters.integer_exporter import IntegerExporter, check_layers
from tuner.exporters.integer_runner import Runner
from tuner.exporters.report import ExportReport, LayerAgreement

PACKAGE = Path(tuner.__file__).parent


@pytest.fixture(scope="module")
def words_report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return exported(words(), tokens(), tmp_path_factory.mktemp("words") / "out")


@pytest.fixture(scope="module")
def words_folder(words_report: ExportReport) -> Path:
    return words_report.files[0].parent


def test_every_quantized_tensor_is_within_one_step(net_report: ExportReport) -> None:
    report = net_report
    assert [layer.name for layer in report.layers] == [
        "stem|0", "depthwise|0", "grouped|0", "up|0", "head|0"
    ]  # fmt: skip
    assert max(layer.max_steps for layer in report.layers) <= 1
    assert [layer.equal > 0.99 for layer in report.layers[:4]] == [True] * 4
    assert report.agreement is not None
    assert report.agreement.max_abs < 0.05
    assert report.left_float == ()
    assert report.latency == ()
    assert report.size_bytes == sum(path.stat().st_size for path in report.files)


def test_codes_of_the_weights_are_those_of_the_simulation(net_folder: Path) -> None:
    tensors = load_file(net_folder / "weights.safetensors")
    for name, module in net().model.named_modules():
        if hasattr(module, "weight"):
            codes, scale = (tensors[f"{name}.weight.{part}"] for part in ("codes", "scale"))
            shape = [-1 if a == (name == "up") else 1 for a in range(codes.ndim)]
            assert codes.dtype == np.int8
            values = codes.astype(np.float32) * scale.reshape(shape)
            assert np.array_equal(values, module.weight.detach().numpy())


def test_what_is_behind_a_clamp_is_requantized(net_folder: Path) -> None:
    nodes = {n.get("quantizer"): n for n in graph_of(net_folder)["nodes"]}
    assert nodes["stem|0"]["op"] == "integer.quantize"
    assert nodes["depthwise|0"]["op"] == "integer.requantize"
    assert nodes["depthwise|0"]["low"] == nodes["depthwise|0"]["zero_point"]  # the ReLU
    assert nodes["up|0"]["op"] == "integer.requantize"
    assert nodes["grouped|0"]["op"] == "integer.quantize"  # of a sum in floats
    assert not any(n["op"] == "aten.relu" and n["name"] == "relu_1" for n in nodes.values())


@pytest.mark.parametrize(("low", "high"), [(-0.25, 0.5), (-0.5, 0.25)])
def test_clamps_are_in_the_codes(low: float, high: float, folder: Path) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.clamp(self.a(x), low, high).view(-1, 2, 3).flatten(1))

    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    report = exported(fitted(Clamped(), x, rules(weight=W8, inputs=INT8)), x, folder)
    found = [n for n in graph_of(folder)["nodes"] if n["op"] == "integer.requantize"]
    assert len(found) == 1
    ends = [found[0][end] * found[0]["scale"] for end in ("low", "high")]
    assert ends == pytest.approx([low, high], abs=found[0]["scale"])
    assert report.layers[-1].max_steps <= 1
    # the codes are moved as the values were
    quantizer = next(n for n in graph_of(folder)["nodes"] if n.get("quantizer") == "b|0")
    assert quantizer["op"] in ("aten.view", "aten.reshape", "aten.flatten")


def test_a_product_with_a_turned_parameter_is_requantized(folder: Path) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))
            self.last = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(x @ self.weight.T))

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    report = exported(fitted(Product(), x), x, folder)
    assert [n["op"] for n in graph_of(folder)["nodes"] if n.get("quantizer")] == [
        "integer.quantize",
        "integer.requantize",
    ]
    assert report.layers[-1].max_steps <= 1
    assert report.layers[-1].equal > 0.98
    assert report.left_float == ()


def test_bounds_for_each_channel_are_kept(folder: Path) -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.register_buffer("cap", torch.tensor([0.1, 0.3, 0.6, 2.0]).view(4, 1, 1))

        def forward(self, image: Tensor) -> Tensor:
            return self.b(torch.minimum(torch.relu(self.a(image)), self.cap))

    report = exported(fitted(Capped(), image(16)), image(), folder)
    node = next(n for n in graph_of(folder)["nodes"] if n["op"] == "integer.requantize")
    assert load_file(folder / "weights.safetensors")[node["high"]].shape == (4, 1, 1)
    assert report.layers[-1].max_steps <= 1
    assert report.layers[-1].equal > 0.99


@pytest.mark.parametrize("n", [1, 3])
def test_other_batch_sizes_run(net_folder: Path, n: int) -> None:
    found = Runner(net_folder).run(image(n, 5).numpy())[0]
    expected = net()(image(n, 5))
    assert found.shape == (n, 5)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=0.05)


def test_other_lengths_run(words_report: ExportReport) -> None:
    folder = words_report.files[0].parent
    assert {left.op for left in words_report.left_float} == set()
    assert graph_of(folder)["inputs"] == [
        {"name": "tokens", "dtype": "int64", "shape": ["batch", "sequence"]}
    ]
    found = Runner(folder).run(tokens(3, 9).numpy())[0]
    expected = words()(tokens(3, 9))
    assert found.shape == expected.shape
    assert np.abs(found - expected.detach().numpy()).max() < 0.1 * expected.abs().max()


def test_rows_of_one_parameter_are_weights_of_their_own(words_folder: Path) -> None:
    kept = load_file(words_folder / "weights.safetensors")
    rows = [kept[f"attention.in_proj_weight.{start}.codes"] for start in (0, 16, 32)]
    assert [codes.shape for codes in rows] == [(16, 16)] * 3


def test_the_runner_needs_no_torch(words_folder: Path, tmp_path: Path) -> None:
    expected = Runner(words_folder).run(tokens().numpy())[0]
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    code = f"""
import sys, types
import numpy as np
for name, place in (("tuner", ""), ("tuner.exporters", "/exporters")):
    module = types.ModuleType(name)
    module.__path__ = [{str(PACKAGE)!r} + place]
    sys.modules[name] = module
sys.modules["torch"] = None
from tuner.exporters.integer_runner import Runner
runner = Runner({str(words_folder)!r})
np.save("found.npy", runner.run(np.load("tokens.npy"))[0])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)


def test_an_op_that_the_runner_lacks_is_named(folder: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.a(x))

    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    model = fitted(Odd(), x)
    with pytest.raises(ExportError, match=r"special_bessel_j0.*Replace these ops"):
        exported(model, x, folder)
    assert not folder.exists()


def test_inputs_that_are_no_integers_are_refused_by_name(folder: Path) -> None:
    space = rules(weight=W8, inputs=TensorScheme(format="e4m3fn"))
    with pytest.raises(ExportError, match=r"e4m3fn is no format of uniform integers.*stem"):
        exported(fitted(Net(), image(16), space), image(), folder)


def test_weights_that_are_no_integers_are_left_float(folder: Path) -> None:
    space = rules(weight=TensorScheme(format="e4m3fn", granularity=PerChannel(0)))
    report = exported(fitted(Net(), image(16), space), image(), folder)
    assert {left.op for left in report.left_float} == {"stem", "depthwise", "grouped", "up", "head"}
    assert "e4m3fn is no format of uniform integers" in report.left_float[0].reason
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-4


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        exported(net(), image(), tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_format_is_no_graph(folder: Path) -> None:
    exported(net(), image(), folder)
    graph = graph_of(folder)
    (folder / "graph.json").write_text(json.dumps({**graph, "version": 3}))
    with pytest.raises(ValueError, match="no graph of the format accutune-integer"):
        Runner(folder)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (OpConfig(), None),
        (OpConfig(weight=W8, inputs=A8), None),
        (OpConfig(weight=W8), "quantize its inputs too"),
        (OpConfig(weight=W8, inputs=TensorScheme(format="mxfp8_e4m3")), "mxfp8_e4m3"),
        (OpConfig(weight=TensorScheme(format="nf4"), inputs=A8), "nf4"),
    ],
)
def test_what_a_target_can_do_is_said_before(config: OpConfig, part: str | None) -> None:
    why = IntegerExporter().why_not(net()._parts.model.ops["stem"], config)
    assert (why is None) if part is None else (part in why)


def test_a_tensor_more_than_one_step_off_is_an_error() -> None:
    close, far = LayerAgreement("a|0", 1.0, 0.9), LayerAgreement("b|0", 1.5, 0.9)
    check_layers([close])
    with pytest.raises(ExportError, match=r"1 of 2 .* b\|0 by 1.5: nothing was written"):
        check_layers([close, far])
