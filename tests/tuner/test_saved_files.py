"""Files are there whole, or not at all."""

from pathlib import Path

import pytest

from tuner.saved_files import staged


def test_staged_files_move_together(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "model.onnx"
    with staged(target) as place:
        place.write_text("graph")
        (place.parent / "model.onnx.data").write_text("weights")
        assert not target.exists()
    assert sorted(path.name for path in target.parent.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]
    assert target.read_text() == "graph"


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def write() -> None:
        with staged(target) as place:
            place.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert target.read_text() == "old"
