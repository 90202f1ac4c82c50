"""Files come to their place when all is well, and otherwise nothing changes there."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.exporters.staging import CannotWriteError, data_name, staged

_DIES = """
import os, signal, sys
from pathlib import Path
from tuner.exporters.staging import staged
with staged(Path(sys.argv[1]), is_file=True) as stage:
    stage.path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

_WITHOUT_LOCKS = """
import sys
from pathlib import Path
for name in ("fcntl", "resource", "pwd", "grp", "termios"):  # what Windows lacks
    sys.modules[name] = None
import tuner, tuner.cli
from tuner.exporters.staging import staged
with staged(Path(sys.argv[1]), is_file=True) as stage:
    stage.path.write_text("whole")
    stage.keep([stage.path])
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_move_together_and_the_first_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, moved, replace = tmp_path / "new" / "folder", [], os.replace

    def counted(path: Path, place: Path) -> None:
        moved.append(place.name)
        replace(path, place)

    monkeypatch.setattr(os, "replace", counted)
    with staged(home / "model.onnx", is_file=True) as stage:
        files = stage.path, stage.path.with_name("model.onnx.data")
        for path in files:
            path.write_text(path.name)
        assert not [name for name in names(home) if not name.startswith(".")]
        assert stage.keep(files) == (home / "model.onnx", home / "model.onnx.data")
    assert names(home) == ["model.onnx", "model.onnx.data"]
    assert (home / "model.onnx").read_text() == "model.onnx"
    assert moved == ["model.onnx.data", "model.onnx"]


def test_what_is_not_kept_is_gone_with_the_folders_made_for_it(tmp_path: Path) -> None:
    with staged(tmp_path / "new" / "folder", is_file=False) as stage:
        (stage.path / "graph.json").write_text("half")
    assert names(tmp_path) == []


def test_data_that_the_older_file_named_go_and_those_of_others_stay(tmp_path: Path) -> None:
    own = ["model.onnx.data", "model.onnx.0123456789abcdef.data"]
    others = ["model.onnx.mine.data", "other.onnx.data", "model.onnx.backup"]
    for name in (*own, *others):
        (tmp_path / name).write_text("data")
    (tmp_path / "model.onnx").write_text("constants are in model.onnx.data, and they")

    def export(contents: str) -> None:
        with staged(tmp_path / "model.onnx", is_file=True) as stage:
            stage.path.write_text(contents)
            stage.keep([stage.path])

    export("new")
    assert names(tmp_path) == sorted(["model.onnx", *others])
    (tmp_path / "model.onnx.data").write_text("of the user")
    export("newer")
    assert names(tmp_path) == sorted(["model.onnx", "model.onnx.data", *others])


def test_data_are_named_by_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "data"
    found = []
    for contents in ("one", "other", "one"):
        path.write_text(contents)
        found.append(data_name(tmp_path / "model.onnx", path))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("error", [OSError(5, "of the user's own"), KeyboardInterrupt()])
def test_an_error_goes_on_and_what_was_there_stays(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "model.onnx").write_text("old")

    def write() -> None:
        with staged(tmp_path / "model.onnx", is_file=True) as stage:
            stage.path.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert names(tmp_path) == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


def enter(path: Path, is_file: bool) -> None:
    with staged(path, is_file):
        raise AssertionError("entered")


@pytest.mark.parametrize(
    ("make", "is_file", "message"),
    [
        (Path.mkdir, True, "it is a folder, where a file is to be"),
        (Path.touch, False, "it is a file, where a folder is to be"),
    ],
)
def test_what_is_in_the_way_is_told_at_once(
    tmp_path: Path, make: Callable[[Path], None], is_file: bool, message: str
) -> None:
    make(tmp_path / "model.onnx")
    with pytest.raises(CannotWriteError, match=message):
        enter(tmp_path / "model.onnx", is_file)
    with pytest.raises(CannotWriteError, match=r"cannot write '.*/Å ö': File name too long"):
        enter(tmp_path / ("x" * 300) / "Å ö", is_file=True)
    assert names(tmp_path) == ["model.onnx"]


def test_a_folder_in_the_way_of_one_file_moves_none(tmp_path: Path) -> None:
    (tmp_path / "out" / "graph.json").mkdir(parents=True)

    def write() -> None:
        with staged(tmp_path / "out", is_file=False) as stage:
            files = stage.path / "graph.json", stage.path / "weights"
            for path in files:
                path.write_text("new")
            stage.keep(files)

    with pytest.raises(CannotWriteError, match=r"cannot write '.*/out': graph.json is a folder"):
        write()
    assert names(tmp_path / "out") == ["graph.json"]


def test_what_the_killed_left_goes_and_what_the_living_write_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    command = [sys.executable, "-c", _DIES, str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    with staged(path, is_file=True) as one:
        assert left not in names(tmp_path)
        with staged(path, is_file=True) as other:
            assert len({one.path, other.path}) == len(names(tmp_path)) == 2
            one.path.write_text("one")
            other.path.write_text("other")
            one.keep([one.path])
        assert names(tmp_path) == sorted([path.name, one.path.parent.name])
    assert names(tmp_path) == ["model.onnx"]
    assert path.read_text() == "one"


def test_files_come_to_their_place_where_folders_have_no_locks(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    subprocess.run([sys.executable, "-c", _WITHOUT_LOCKS, str(path)], check=True)
    assert names(tmp_path) == ["model.onnx"]
    assert path.read_text() == "whole"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_new", [False, True])
def test_what_was_there_comes_back_where_one_file_cannot_be_moved(
    error: BaseException, is_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {} if is_new else {"graph.json": "old graph", "weights": "old weights"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    replace, moved = os.replace, []

    def broken(path: Path, place: Path) -> None:
        moved.append(place.name)
        if len(moved) == 2:
            raise error
        replace(path, place)

    with staged(tmp_path, is_file=False) as stage:
        files = [stage.path / name for name in ("graph.json", "weights")]
        for path in files:
            path.write_text("new")
        monkeypatch.setattr(os, "replace", broken)
        with pytest.raises((CannotWriteError, KeyboardInterrupt)):
            stage.keep(files)
    assert moved[:2] == ["weights", "graph.json"]
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == old


def test_a_folder_in_a_file_s_place_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    message = "cannot write .*model.onnx is a folder"
    with (
        pytest.raises(CannotWriteError, match=message),
        staged(tmp_path, is_file=False, names=["model.onnx"]),
    ):
        raise AssertionError("refused too late")
