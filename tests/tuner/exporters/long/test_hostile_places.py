"""What kills an export, fills its disk or exports beside it: an artifact is whole, or the old."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tuner.exporters.onnx_nets import floats, quantized
from tuner.errors import ExportError
from tuner.exporters import onnx_file
from tuner.exporters.integer_runner import Runner
from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.targets import targets
from tuner.exporters.torch_package import has_compiler
from tuner.quantized_model import QuantizedModel

_SETUP = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from tuner import TuningConfig, quantization
from tuner.errors import ExportError

target, path, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(seed)
x = torch.randn(16, 64)
layers = torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
model = quantization.fit(torch.nn.Sequential(*layers).eval(), [x], config=TuningConfig())


def export(path, eval_func=None):
    return model.export(path, target=target, eval_func=eval_func, batches=())
"""
_DIES = "export(path, lambda net: os.kill(os.getpid(), signal.SIGKILL))"
_BARE = "export(path)"
_MEETS = """
def wait(net):
    Path(f"{seed}.ready").touch()
    while len(list(Path().glob("*.ready"))) < 2:
        time.sleep(0.01)
    return 1.0
export(f"alone-{seed}")
export(path, wait)
"""
_FULL = """
import resource
limit = int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
export(path)
"""
_INTEGER_OR_ONNX = pytest.mark.parametrize("target", ["integer", "onnxruntime"])


def command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", f"{_SETUP}\n{code}", *map(str, arguments)]


def run(code: str, *arguments: object, within: tuple[str, ...] = ()) -> tuple[int, str]:
    whole = [*within, *command(code, *arguments)]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


_DIES_BETWEEN = """
from tuner.exporters import onnx_file
onnx_file._EXTERNAL_BYTES = 1000
replace, last = os.replace, sys.argv[4]

def die(path, place):
    if Path(place).name == last and "accutune-export" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(path, place)

os.replace = die
export(path)
"""


def test_a_kill_between_two_files_leaves_the_older_model_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert run(_DIES_BETWEEN, "onnxruntime", path, 1, "nothing") == (0, "")
    old, x = contents(tmp_path), floats(4, 64)
    (expected,) = OnnxRuntimeSession(path).run([x])
    code, _ = run(_DIES_BETWEEN, "onnxruntime", path, 2, path.name)
    assert code == -signal.SIGKILL
    left = {found.name: found.read_bytes() for found in tmp_path.glob("model.*")}
    assert left.items() > old.items()
    torch.testing.assert_close(OnnxRuntimeSession(path).run([x])[0], expected, rtol=0, atol=0)
    assert run(_DIES_BETWEEN, "onnxruntime", path, 2, "nothing") == (0, "")
    assert len(contents(tmp_path)) == 2  # what the killed one left is gone, and the older data, too
    assert not torch.equal(OnnxRuntimeSession(path).run([x])[0], expected)


def test_a_kill_between_two_files_of_integers_is_found_when_they_are_read(tmp_path: Path) -> None:
    assert run(_DIES_BETWEEN, "integer", tmp_path, 1, "nothing") == (0, "")
    Runner(tmp_path)
    code, _ = run(_DIES_BETWEEN, "integer", tmp_path, 2, "graph.json")
    assert code == -signal.SIGKILL
    with pytest.raises(ValueError, match="come from different exports"):
        Runner(tmp_path)
    assert run(_DIES_BETWEEN, "integer", tmp_path, 2, "nothing") == (0, "")
    Runner(tmp_path)
    graph = json.loads((tmp_path / "graph.json").read_text())
    del graph["weights_sha256"]  # as older exports have it
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    Runner(tmp_path)


@_INTEGER_OR_ONNX
def test_a_kill_leaves_the_older_artifact_and_the_next_export_clears(
    target: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(_BARE, target, out, 1) == (0, "")
    old = contents(out)
    code, _ = run(_DIES, target, out, 2)
    assert code == -signal.SIGKILL
    left = [path for path in out.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].name.startswith(".")
    assert {name: (out / name).read_bytes() for name in old} == old
    assert run(_BARE, target, out, 2) == (0, "")
    new = contents(out)
    assert sorted(new) == sorted(old)
    assert new != old


_SMALL_DISK = """
mount -t tmpfs -o size=16k tmpfs "$0" && echo old > "$0/model.onnx" || exit 9
"$@"
code=$?
echo "left: $(ls -A "$0") $(cat "$0/model.onnx")" >&2
exit $code
"""


def test_a_full_disk_leaves_the_older_artifact(tmp_path: Path) -> None:
    within = ("unshare", "-rm", "sh", "-c", _SMALL_DISK, str(tmp_path))
    out = tmp_path / "model.onnx"
    code, stderr = run(_FULL, "onnxruntime", out, 1, 0, within=within)
    if "left:" not in stderr:
        pytest.skip("this user may not mount: a full disk is NOT tested here, only a limit")
    assert code == 1, stderr
    assert f"CannotWriteError: cannot write {str(out)!r}: No space left on device. Choose" in stderr
    assert "left: model.onnx old" in stderr


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("size", ["16k", "3m"])  # for the package, for the compiler's own files
def test_packages_tell_of_a_small_folder_for_temporary_files(size: str, tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "model.pt2"
    small.mkdir()
    out.write_text("old")
    script = f'mount -t tmpfs -o size={size} tmpfs {small} || exit 9\nexec "$@"'
    environment = f"TMPDIR={small}", f"TORCHINDUCTOR_CACHE_DIR={small}/cache"
    within = ("unshare", "-rm", "sh", "-c", script, "sh", "env", *environment)
    code, stderr = run(_BARE, "torch", out, 1, within=within)
    if "ExportError" not in stderr and "mount" in stderr:
        pytest.skip("this user may not mount: a small temporary folder is NOT tested here")
    assert code == 1, stderr
    assert f"the folder for temporary files, {str(small)!r}, has no room" in stderr
    assert "Set the environment variable TMPDIR" in stderr
    assert out.read_text() == "old"


def test_a_limit_of_sizes_leaves_the_older_artifact(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text("old")
    code, stderr = run(_FULL, "integer", tmp_path, 1, 1000)
    assert code == 1, stderr
    assert f"CannotWriteError: cannot write {str(tmp_path)!r}: File too large. Choose" in stderr
    assert contents(tmp_path) == {"graph.json": b"old"}


def test_two_exports_at_once_give_one_of_both(tmp_path: Path) -> None:
    both = [
        subprocess.Popen(command(_MEETS, "integer", "out", seed), cwd=tmp_path) for seed in (1, 2)
    ]
    assert [each.wait(timeout=300) for each in both] == [0, 0]
    alone = [contents(tmp_path / f"alone-{seed}") for seed in (1, 2)]
    assert alone[0] != alone[1]
    assert contents(tmp_path / "out") in alone


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    return quantized(net, floats(4, 32), "int8")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ExportError])
def test_constants_beside_the_file_come_and_stay_with_it(
    error: type[BaseException],
    model: QuantizedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_file, "_EXTERNAL_BYTES", 1000)

    def eval_func(net: torch.nn.Module) -> float:
        raise error

    path = tmp_path / "model.onnx"
    with pytest.raises(error):
        model.export(path, eval_func=eval_func, batches=())
    assert list(tmp_path.iterdir()) == []
    report = model.export(path, batches=())
    assert report.files[0] == path
    assert sorted(tmp_path.iterdir()) == sorted(report.files)
    old = contents(tmp_path)
    (found,) = OnnxRuntimeSession(path, optimized=False).run([floats(4, 32)])
    torch.testing.assert_close(found, model(floats(4, 32)), rtol=0, atol=0.02)
    with pytest.raises(error):
        model.export(path, eval_func=eval_func, batches=())
    assert contents(tmp_path) == old
    monkeypatch.undo()
    model.export(path, batches=())
    assert list(tmp_path.iterdir()) == [path]  # constants that it no longer has beside it are gone


@pytest.mark.parametrize(
    "target", [t for t in targets() if t != "torch-bf16" and (has_compiler() or t != "torch")]
)
def test_names_with_spaces_and_letters_of_all_kinds(
    target: str, model: QuantizedModel, tmp_path: Path
) -> None:
    for _ in range(1 if target == "torch" else 2):  # onto itself the second time
        report = model.export(tmp_path / "my models" / "größe 模型", target=target, batches=())
    assert all(path.exists() for path in report.files)
    home = tmp_path / "my models" / "größe 模型"
    assert sorted(home.iterdir()) == sorted(report.files)
