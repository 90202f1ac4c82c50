"""tuner serve and tuner worker."""

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from server import logs, worker
from server.app import create_app
from server.commands.options import DatabaseUrl, DataDir, opened, settings
from server.commands.outcome import err, reported
from server.commands.tables import out
from server.own_workers import OwnWorkers
from server.serving import bound, serve, url_of
from server.settings import Settings
from server.startup import check_exposure
from server.tokens import Tokens

app = typer.Typer()

_Json = Annotated[
    bool | None, typer.Option("--log-json/--log-plain", help="Log one JSON object a line.")
]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@app.command("serve")
@reported
def serve_command(
    host: Annotated[
        str | None, typer.Option(help="The address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="0 takes any that is free.", show_default="8765")
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes to run, too.")] = 1,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="The same as --workers 0.")
    ] = False,
    log_json: _Json = None,
) -> None:
    """Run the service: the API, the dashboard and a worker. Ctrl-C lets the running trial end.

    Every setting can also be given as ACCUTUNE_<NAME>, such as ACCUTUNE_PORT=8080.
    """
    chosen = settings(
        host=host, port=port, data_dir=data_dir, database_url=database_url, log_json=log_json
    )
    logs.setup(chosen.log_json)
    with opened(chosen) as database:
        check_exposure(chosen, Tokens(database))
    with bound(chosen) as listener:
        own = OwnWorkers(chosen, 0 if no_worker else workers)
        _handle_signals(own)
        with own:
            url = url_of(listener)
            serve(create_app(chosen), listener, lambda: _welcome(chosen, url))
            listener.close()
            own.drain()
            if own.are_busy:
                err.print("Waiting for the running trials to end; Ctrl-C ends them now.")


@app.command("worker")
@reported
def worker_command(
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    slots: Annotated[
        int | None, typer.Option(help="Jobs to run at a time.", show_default="1")
    ] = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="A device for jobs; may be given several times.")
    ] = None,
    log_json: _Json = None,
) -> None:
    """Run a worker: it takes jobs from the queue until SIGTERM or Ctrl-C.

    The data folder must be the one of the service, on a shared disk where hosts differ.
    """
    chosen = settings(
        data_dir=data_dir, database_url=database_url, slots=slots, gpus=gpu, log_json=log_json
    )
    logs.setup(chosen.log_json)
    with opened(chosen):
        pass
    worker.run(chosen)


def _welcome(chosen: Settings, url: str) -> None:
    kind = chosen.database.partition(":")[0]
    out.print(f"[bold]Dashboard:[/] {url}", soft_wrap=True)
    out.print(
        f"Files are kept in {Path(chosen.data_dir).absolute()}, jobs in {kind}.", soft_wrap=True
    )
    out.print("Ctrl-C ends the service after the running trial.")


def _handle_signals(own: OwnWorkers) -> None:
    """Let the workers drain at the first signal, and hurry at the next.

    uvicorn takes signals while it serves, and sends them again when it has ended.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if own.are_draining:
            own.hurry()
        else:
            own.drain()

    for number in _SIGNALS:
        signal.signal(number, handle)
