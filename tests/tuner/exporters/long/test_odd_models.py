"""Odd models and plans exported to ONNX Runtime: right, or refused with the reason."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tuner import (
    OpConfig,
    PerChannel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import ExportError
from tuner.exporters.report import ExportReport

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def exported(path: Path, model: nn.Module, batch: Any, space: Any = "int8") -> ExportReport:
    torch.manual_seed(0)
    config = TuningConfig(space=space)
    tuned = quantization.fit(model.eval(), [batch], config=config)
    return tuned.export(path / "model.onnx", "onnxruntime", batches=())


class InPlace(nn.Module):
    """Writes to slices of what it computes, and to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.relu_()
        h += 1
        h[:, :2] = 0
        x.mul_(2)
        return self.b(h) + x[:, :4]


def test_a_model_that_works_in_place(tmp_path: Path) -> None:
    report = exported(tmp_path, InPlace(), X.clone())
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(1e-5, 10 * report.agreement.floor)


def test_inputs_and_outputs_of_one_name(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, output: Tensor) -> dict[str, Tensor]:
            return {"output": self.fc(output)}

    (file,) = exported(tmp_path, Echo(), {"output": X}).files
    # from another process and folder, with nothing but the runtime
    moved = tmp_path / "else where" / "net.onnx"
    moved.parent.mkdir()
    file.rename(moved)
    np.save(tmp_path / "x.npy", X.numpy())
    code = (
        "import sys, numpy, onnxruntime as ort\n"
        "s = ort.InferenceSession(sys.argv[1])\n"
        "print([v.name for v in s.get_inputs()], [v.name for v in s.get_outputs()])\n"
        "print(s.run(['output_out'], {'output': numpy.load(sys.argv[2])[:5]})[0].shape)\n"
        "assert 'torch' not in sys.modules and 'tuner' not in sys.modules\n"
    )
    run = [sys.executable, "-c", code, str(moved), str(tmp_path / "x.npy")]
    told = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert told.splitlines() == ["['output'] ['output_out']", "(5, 8)"]


def test_a_table_of_fp8_is_stored_as_floats_and_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(30, 32), nn.Linear(32, 5))
    scheme = TensorScheme(format="e4m3fn", granularity=PerChannel(0))
    rule = Rule(op_types=["Embedding"], options=[OpConfig(weight=scheme)])
    ids = torch.arange(24).reshape(4, 6)
    report = exported(tmp_path, model, ids, SearchSpace(preset="int8", rules=[rule]))
    assert {left.op: left.reason for left in report.left_float}["0"].startswith("runtimes look no")


def test_what_the_runtime_cannot_take_is_an_error_of_ours(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.real)

    with pytest.raises(ExportError, match="ONNX Runtime cannot run the model on x"):
        exported(tmp_path, Complex(), X.to(torch.complex64))


def test_a_batch_that_the_model_branches_on_is_fixed_and_told(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * (2 if len(x) > 3 else 1)

    report = exported(tmp_path, Branching(), X)
    assert "Axis 0 (batch) of x is fixed at 6" in report.summary()


class Picky(nn.Module):
    """Reads the second of three inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, first: Tensor, x: Tensor, last: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "openvino", "torch", "integer"])
def test_inputs_that_nothing_reads(target: str, tmp_path: Path) -> None:
    """OpenVINO forgets them: the others must not move up."""
    batch = (X + 9, X, X - 9)
    config = TuningConfig(target=target)
    tuned = quantization.fit(Picky().eval(), [batch], config=config)
    report = tuned.export(tmp_path, target, example_inputs=batch, batches=(1,))
    assert report.agreement is not None
    assert report.agreement.max_abs <= max(1e-5, report.agreement.floor)
