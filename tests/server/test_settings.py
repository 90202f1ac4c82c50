"""Settings that are wrong are named, without what they hold, and without a traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest

from server.commands.options import settings
from server.db import Database
from server.errors import SettingsError


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PORT", "99999", "less than or equal to 65535"),
        ("LEASE_S", "soon", "valid number"),
        ("ALLOWED_HOSTS", "example.com", "give a JSON list"),
        ("DATABASE_URL", "mysql://ann:hush@host/x", "sqlite or postgresql"),
        ("DATABASE_URL", "ann:hush@host", "no database URL"),
    ],
)
def test_a_wrong_setting_is_named(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCUTUNE_{name}", value)
    with pytest.raises(SettingsError, match=reason) as caught:
        settings()
    assert name.lower() in str(caught.value).lower()
    assert "hush" not in str(caught.value)


def test_what_the_command_line_gives_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCUTUNE_PORT", "1234")
    assert (settings().port, settings(port=80).port, settings(port=None).port) == (1234, 80, 1234)


def _file(folder: Path) -> Path:
    (folder / "file").write_text("no folder")
    return folder / "file"


def _below_a_file(folder: Path) -> Path:
    return _file(folder) / "data"


@pytest.mark.parametrize("make", [_file, _below_a_file])
def test_a_folder_that_cannot_be_made_is_told(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"folder cannot be made: .*file"):
        Database(settings(data_dir=make(tmp_path)).database)
