"""Exports to places that fail, are taken, or have odd names: what was there before stays."""

import errno
import os
import signal
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import nn

from tuner import TuningConfig, quantization
from tuner.errors import ExportError
from tuner.exporters.integer_runner import Runner
from tuner.quantized_model import QuantizedModel

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
_NOBODY = 65534


def fitted(seed: int) -> QuantizedModel:
    torch.manual_seed(seed)
    return quantization.fit(nn.Sequential(nn.Linear(8, 4)).eval(), [X], config=TuningConfig())


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return fitted(0)


@pytest.fixture
def old(tmp_path: Path) -> dict[str, bytes]:
    """Files of an older artifact in `out`."""
    fitted(1).export(tmp_path / "out", target="integer")
    return contents(tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_nobody_sees_what_is_not_checked(
    model: QuantizedModel, old: dict[str, bytes], tmp_path: Path
) -> None:
    seen = []

    def eval_func(net: nn.Module) -> float:
        seen.append({name: (tmp_path / "out" / name).read_bytes() for name in old})
        return 1.0

    report = model.export(tmp_path / "out", target="integer", eval_func=eval_func)
    assert seen == [old, old]
    new = contents(tmp_path / "out")
    assert sorted(new) == sorted(old)
    assert all(new[name] != old[name] for name in old)
    assert report.files == (tmp_path / "out/graph.json", tmp_path / "out/weights.safetensors")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT be Ctrl-C: what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_what_was_there(
    model: QuantizedModel, old: dict[str, bytes], tmp_path: Path
) -> None:
    def eval_func(net: nn.Module) -> float:
        signal.raise_signal(signal.SIGINT)  # in this thread: others may belong to a runtime
        return 1.0

    for name in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            model.export(tmp_path / name, target="integer", eval_func=eval_func)
    assert contents(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_errors_of_eval_func_go_on_as_they_are(
    model: QuantizedModel, old: dict[str, bytes], tmp_path: Path
) -> None:
    def eval_func(net: nn.Module) -> float:
        raise FileNotFoundError(errno.ENOENT, "no data", "images")

    with pytest.raises(FileNotFoundError, match="no data"):
        model.export(tmp_path / "out", target="integer", eval_func=eval_func)
    assert contents(tmp_path / "out") == old


def test_an_export_onto_itself_gives_the_same(model: QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    model.export(tmp_path / "out", target="integer")
    once = contents(tmp_path / "out")
    model.export(tmp_path / "out", target="integer")
    assert contents(tmp_path / "out") == once
    assert sorted(once) == ["graph.json", "notes.txt", "weights.safetensors"]


@pytest.mark.parametrize("name", ["with space", "模型 & Söhne/(1)", "-o", "a.onnx", ".hidden"])
def test_odd_names(name: str, model: QuantizedModel, tmp_path: Path) -> None:
    report = model.export(tmp_path / name, target="integer")
    assert [path.parent for path in report.files] == [tmp_path / name] * 2
    found = Runner(tmp_path / name).run(X.numpy())[0]
    np.testing.assert_allclose(found, model(X).detach().numpy(), atol=1e-3)


def test_files_have_the_rights_that_the_user_gives(model: QuantizedModel, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        report = model.export(tmp_path / "out", target="integer")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in report.files] == [0o640] * 2
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@contextmanager
def as_nobody() -> Iterator[Path]:
    """Yield a folder of others, and give up the right of root to write everywhere."""
    is_root = os.geteuid() == 0
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if is_root:
            os.seteuid(_NOBODY)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


@pytest.mark.parametrize("name", ["", "new", "new/folder"])
def test_a_folder_of_others_is_refused_before_all_work(name: str, model: QuantizedModel) -> None:
    with as_nobody() as folder:
        with pytest.raises(ExportError) as caught:
            # refused before it is seen that this is no batch of the model
            model.export(folder / name, target="integer", dynamic_axes={"x": [0]})
        assert list(folder.iterdir()) == []
    text = str(caught.value)
    assert f"cannot write {str(folder / name)!r}: Permission denied. Choose a path" in text


def test_exports_in_threads_wait_for_one_another(model: QuantizedModel, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        paths = [tmp_path / str(index) for index in range(2)]
        reports = list(pool.map(partial(model.export, target="integer"), paths))
    assert [report.files[0].parent for report in reports] == paths


def test_a_name_that_is_too_long_is_refused_before_anything_is_compiled(
    model: QuantizedModel, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"cannot write '.*n\.pt2': File name too long") as caught:
        model.export(tmp_path / f"{'n' * 300}.pt2", target="torch")
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())
