"""A process that leads a group of its own, with a log, so that all that it starts ends with it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


class ProcessGroup:
    """The process of `arguments` and all that it starts; output and errors go to `log`.

    Raises OSError where it cannot be started.
    """

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                arguments,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The id of the process, and of its group."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code of the process (−n after signal n), None while it runs."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ask(self) -> None:
        """Send SIGTERM to the process alone, which knows how to end well."""
        self._process.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """Send SIGINT to the whole group."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End the whole group, and wait for its leader's end."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def memory_bytes(self) -> int:
        """Return the resident memory of the process and its descendants together."""
        try:
            leader = psutil.Process(self.pid)
            return sum(map(_resident_bytes, (leader, *leader.children(recursive=True))))
        except psutil.NoSuchProcess:
            return 0

    def trim_log(self, max_bytes: int) -> None:
        """Begin the log anew where it has grown beyond this; the group goes on writing to it."""
        with contextlib.suppress(FileNotFoundError):
            if self._log.stat().st_size > max_bytes:
                os.truncate(self._log, 0)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # nobody is left; macOS: only zombies are
            return


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def tail(log: Path, max_bytes: int) -> str:
    """Return the last lines of a log; it is empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - max_bytes, 0))
            return file.read().decode(errors="replace").replace("\0", "").strip()
    except OSError:
        return ""
