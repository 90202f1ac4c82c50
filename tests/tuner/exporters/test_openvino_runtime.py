"""Sessions of OpenVINO leave the process as it was."""

import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("openvino")

_OVERLAPPING = """
import signal, sys
from pathlib import Path
from tuner.exporters.openvino_runtime import OpenVinoSession
first = OpenVinoSession(Path(sys.argv[1]))
second = OpenVinoSession(Path(sys.argv[1]))
del first
del second
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_is_an_interrupt_after_sessions_that_overlap(tmp_path: Path) -> None:
    given, got = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [given], [got])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    command = [sys.executable, "-c", _OVERLAPPING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != -signal.SIGSEGV
    assert done.stdout == "interrupted\n", done.stderr
