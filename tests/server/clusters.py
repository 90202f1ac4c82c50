"""A PostgreSQL server of the tests' own, that may be stopped and started."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PATTERN = "usr/lib/postgresql/*/bin/pg_ctl"
_OWNER = "postgres"  # PostgreSQL refuses to run as root


class Cluster:
    """A server on a free port of this machine."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        """The URL of a database on it."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def create(self) -> None:
        """Make the files of the server."""
        self._run("initdb", "-A", "trust", "-U", "postgres", "-N", "-D", str(self._data))

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -k {self._folder} -F"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", log, "-o", options)

    def stop(self) -> None:
        """Stop the server at once, as a crash would."""
        self._run("pg_ctl", "stop", "-m", "immediate", "-D", str(self._data))

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        user = _OWNER if os.geteuid() == 0 else None
        subprocess.run(
            command, check=True, user=user, cwd=self._folder, stdout=subprocess.DEVNULL, timeout=60
        )


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Give a server that runs; skip where PostgreSQL's programs are not installed."""
    found = sorted(Path("/").glob(_PATTERN))
    if not found:
        pytest.skip(f"NO POSTGRESQL of one's own: there is no /{_PATTERN}")
    folder = Path(tempfile.mkdtemp(prefix="accutune-pg-"))
    if os.geteuid() == 0:
        try:
            shutil.chown(folder, _OWNER)
        except LookupError:
            pytest.skip(f"NO POSTGRESQL of one's own: root needs a user {_OWNER!r} to run it")
    cluster = Cluster(found[-1].parent, folder)
    try:
        cluster.create()
        cluster.start()
        yield cluster
        cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
