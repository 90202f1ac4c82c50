"""Exports say nothing: no library's lines on stdout or stderr, no Python warnings of theirs."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from tuner.exporters.onnx_file import _silent
from tuner.exporters.targets import targets
from tuner.exporters.torch_package import has_compiler


class Net(nn.Module):
    """What libraries have something to say about: constants split, constants as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.register_buffer("halves", torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one, other = self.halves.split(4)
        pooled = torch.relu(self.conv(x)).mean((2, 3))
        return self.fc(pooled) * one + other, self.fc.weight, torch.arange(3)


_EXPORTS = """
import sys, tempfile, torch
from tests.tuner.exporters.long.test_silence import Net
from tuner import TuningConfig, quantization

torch.manual_seed(0)
config = TuningConfig()
model = quantization.fit(Net().eval(), [torch.randn(4, 3, 6, 6)], config=config)
for target in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as folder:
        report = model.export(folder, target=target, batches=(1,))
        assert report.size_bytes
"""


COMPILED = [target for target in targets() if target.startswith("torch")]
OTHERS = [target for target in targets() if target not in COMPILED]
needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="no C++ compiler: packages are NOT tested here"
)


@pytest.mark.parametrize("asked", [OTHERS, pytest.param(COMPILED, marks=needs_compiler)])
def test_nothing_is_said(asked: list[str]) -> None:
    # those of imports apart, which Python itself gives under this switch
    switches = "-W", "always", "-W", "ignore::ImportWarning"
    command = [sys.executable, *switches, "-c", _EXPORTS, *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_messages_of_the_same_libraries_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    names = (
        "onnx_ir.passes.common.initializer_deduplication",
        "onnxscript.optimizer._constant_folding",
    )
    with caplog.at_level(logging.WARNING), _silent():
        for name in names:
            logging.getLogger(name).warning("Evaluation failed: %s", "reasons")
    assert [record.name for record in caplog.records] == list(names)
    assert all(not logging.getLogger(name).filters for name in names)
