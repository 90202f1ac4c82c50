"""The process of a worker that belongs to a `tuner serve`: it drains when that one is gone."""

import os
import signal
import sys
import threading

from server import logs, worker
from server.settings import Settings


def _watch() -> None:
    """Stop at the end of stdin: nothing is ever written to it, and only its owner holds it open."""
    while os.read(sys.stdin.fileno(), 1):  # unbuffered: no lock is held when the process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run a worker with the settings of the environment."""
    settings = Settings()
    logs.setup(settings.log_json)
    threading.Thread(target=_watch, name="owner", daemon=True).start()
    worker.run(settings)


if __name__ == "__main__":
    main()
