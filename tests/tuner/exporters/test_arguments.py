"""Arguments of export() that cannot work are refused before anything is traced."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tuner import TuningConfig, quantization
from tuner.errors import ExportError
from tuner.quantized_model import QuantizedModel

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    torch.manual_seed(0)
    return quantization.fit(nn.Sequential(nn.Linear(8, 4)).eval(), [X], config=TuningConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": 3}, "path is 3: give the path of a file or folder"),
        ({"path": "a\0b"}, "give the path of a file or folder"),
        ({"batches": 8}, "batches is 8: give a tuple of batch sizes"),
        ({"batches": (0,)}, "batch sizes from 1"),
        ({"batches": ("1",)}, "batch sizes from 1"),
        ({"batches": (True,)}, "batch sizes from 1"),
        (
            {"batches": (10**12,)},
            "batch of 1000000000000 take 29,802 GiB, more than this",
        ),
        (
            {"path": "net.onnx", "target": "torch"},
            "'torch' writes .pt2 files: give the path of one",
        ),
        ({"path": "net.xml", "target": "openvino"}, "'openvino' writes .onnx files"),
        ({"dynamic_axes": [0]}, r"give a mapping of input names to axes, such as {'input': \[0\]}"),
        ({"dynamic_axes": {"input": 0}}, "give the numbers of its axes"),
        ({"dynamic_axes": {"input": ["batch"]}}, "give the numbers of its axes"),
        ({"dynamic_axes": {"input": {0: 3}}}, "or names for them, {0: 'batch'}"),
        ({"dynamic_axes": {"input": {0: ""}}}, "or names for them, {0: 'batch'}"),
        ({"dynamic_axes": {"input": [True]}}, "give the numbers of its axes"),
        ({"dynamic_axes": {"x": [0]}}, "speaks of 'x': the model's inputs are input"),
        ({"dynamic_axes": {"input": [-1]}}, "no axis -1"),
        ({"example_inputs": []}, "no tensor with elements"),
        ({"example_inputs": {}}, "no tensor with elements"),
        ({"example_inputs": X[:0]}, "no tensor with elements"),
        ({"example_inputs": X * float("nan")}, "has NaN or no data"),
        (
            {"example_inputs": X.to_sparse()},
            r"has a sparse tensor: give dense ones, x.to_dense\(\)",
        ),
        ({"example_inputs": X.to("meta")}, "has NaN or no data"),
        ({"example_inputs": np.zeros((6, 8), np.float32)}, "is a ndarray: give a tensor"),
        ({"example_inputs": X[:, :5]}, r"refuses example_inputs \(\[6, 5\] torch.float32\)"),
        ({"example_inputs": X.double()}, r"refuses example_inputs \(\[6, 8\] torch.float64\)"),
        ({"example_inputs": {"y": X}}, "refuses example_inputs"),
        ({"eval_func": "accuracy"}, "eval_func is a str: give a function"),
    ],
)
def test_what_cannot_work_is_refused(
    model: QuantizedModel, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        model.export(**{"path": tmp_path / "out", "target": "integer", **arguments})
    assert not list(tmp_path.iterdir())
