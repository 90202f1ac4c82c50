"""What tests of exports share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuner.exporters.integer_nets import exported, image, net
from tuner.exporters.report import ExportReport


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="session")
def net_report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return exported(net(), image(), tmp_path_factory.mktemp("net") / "out")


@pytest.fixture(scope="session")
def net_folder(net_report: ExportReport) -> Path:
    return net_report.files[0].parent


@pytest.fixture(scope="module")
def own_times(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the times of ops that tests measure in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("tuner.op_times.cache_folder", lambda: folder)
        yield
