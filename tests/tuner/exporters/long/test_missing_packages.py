"""Without a target's packages all else works, and the target says what to install."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_TASK = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
x = torch.randn(16, 8)


def task():
    return net, [x], lambda model: 1.0
"""

_CODE = """
import json, sys
from importlib.machinery import PathFinder

packages, targets = json.loads(sys.argv[1]), json.loads(sys.argv[2])


class Without:
    \"\"\"Finds modules as Python does, but for those that are not installed here.\"\"\"

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in packages:
            return None
        return PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import tuner
from mytask import net, x
from tuner import TuningConfig, quantization
from tuner.cli import run

said = {}


def hear(what, call):
    try:
        call()
        said[what] = "done"
    except tuner.TunerError as error:
        said[what] = f"{type(error).__name__}: {error}"


model = quantization.fit(net, [x], config=TuningConfig())
model.save("saved")
for target in targets:
    hear(f"fit {target}", lambda: quantization.fit(net, [x], config=TuningConfig(target=target)))
    hear(f"export {target}", lambda: model.export(target, target=target, batches=()))
print(json.dumps(said), flush=True)
if sys.argv[3]:
    sys.argv = ["tuner", sys.argv[3], "saved", "mytask:task", "--target", targets[0]]
    run()
"""


def run(
    tmp_path: Path, packages: list[str], targets: list[str], command: str = ""
) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    (tmp_path / "mytask.py").write_text(_TASK)
    arguments = json.dumps(packages), json.dumps(targets), command
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done


@pytest.mark.parametrize(
    ("package", "target", "extra", "command"),
    [
        ("onnx", "onnx", "onnx", "export"),
        ("onnxscript", "onnxruntime", "onnx", "bench"),
        ("onnx_ir", "openvino", "openvino", "bench"),
        ("onnxruntime", "onnxruntime", "onnx", "export"),
        ("openvino", "openvino", "openvino", "export"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    package: str, target: str, extra: str, command: str, tmp_path: Path
) -> None:
    said, done = run(tmp_path, [package], [target], command)
    text = f"ExportError: target '{target}' needs the package '{package}': pip install "
    assert said == dict.fromkeys(
        (f"fit {target}", f"export {target}"), f"{text}'accutune[{extra}]'"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    shown = " ".join(done.stderr.split()).replace("error: ExportError ", "")
    assert shown == f"{text}'accutune[{extra}]'".removeprefix("ExportError: ")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "mytask.py",
        "saved",
    ]


def test_without_all_of_them_the_other_targets_work(tmp_path: Path) -> None:
    packages = ["onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino", "ml_dtypes"]
    said, _ = run(tmp_path, packages, ["integer", "calibration"])
    assert set(said.values()) == {"done"}
    assert len(said) == 4


def test_onnx_does_not_need_openvino(tmp_path: Path) -> None:
    said, _ = run(tmp_path, ["openvino"], ["integer", "onnxruntime"])
    assert set(said.values()) == {"done"}


def test_a_package_that_cannot_be_loaded_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(
        "raise ImportError('libgomp.so.1: cannot open shared object file', name='onnxruntime')"
    )
    said, _ = run(tmp_path, [], ["integer", "onnx"])
    assert said["export integer"] == "done"
    assert "needs what cannot be loaded (libgomp.so.1: cannot open" in said["export onnx"]
    assert "pip install 'accutune[onnx]'" in said["fit onnx"]
