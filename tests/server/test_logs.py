"""The log: one line a request, with ids, and without anything that is secret."""

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from server import logs
from server.app import create_app
from server.auth import SESSION_COOKIE, Scope
from server.logs import JsonFormatter, PlainFormatter, bind, redact
from tests.server.access import LocalClient, app_of, bearer, guarded, on_sqlite

SECRET = "acc_" + "aB3-_" * 8 + "xyz"
SESSION = "ses_01m7zeqh0c4n4tfb7qfxdscpwv.1795321427.wGgj4lOTKymsw1TB." + "f0" * 32


def made(message: str, *args: Any, **fields: Any) -> logging.LogRecord:
    record = logging.LogRecord("server.x", logging.WARNING, "f.py", 1, message, args, None)
    record.__dict__.update(fields)
    return record


def test_a_json_line_has_time_level_message_context_and_extra() -> None:
    with bind(request_id="r"), bind(job_id="j", trial=3):
        line = JsonFormatter().format(made("%d jobs\nand more", 2, status=200))
    found = json.loads(line)
    assert "\n" not in line
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning",
        "logger": "server.x",
        "message": "2 jobs\nand more",
        "request_id": "r",
        "job_id": "j",
        "trial": 3,
        "status": 200,
    }


def test_the_context_ends_with_its_block() -> None:
    with bind(request_id="r"):
        with bind(job_id="j"):
            pass
        assert "job_id" not in JsonFormatter().format(made("x"))
    assert "request_id" not in JsonFormatter().format(made("x"))


def test_tasks_have_contexts_of_their_own() -> None:
    async def line(name: str) -> str:
        with bind(request_id=name):
            await asyncio.sleep(0)
            return str(json.loads(JsonFormatter().format(made("x")))["request_id"])

    async def several() -> list[str]:
        return list(await asyncio.gather(*(line(str(number)) for number in range(5))))

    assert asyncio.run(several()) == ["0", "1", "2", "3", "4"]


def test_a_plain_line_cannot_be_forged() -> None:
    with bind(request_id="r"):
        line = PlainFormatter().format(made("path %s", "/a\n2026-01-01 ERROR root: forged"))
    assert "\n" not in line
    assert "WARNING server.x: path /a\\n2026" in line
    assert line.endswith("[request_id=r]")


@pytest.mark.parametrize("formatter", [JsonFormatter(), PlainFormatter()])
def test_tracebacks_are_told_without_secrets(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(f"cannot use {SECRET}")
    except ValueError:
        record = made("it failed")
        record.exc_info = sys.exc_info()
    line = formatter.format(record)
    assert "ValueError" in line
    assert SECRET not in line
    assert "acc_***" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token {SECRET}.", "token acc_***."),
        (f"cookie={SESSION}; x", "cookie=ses_***; x"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ***"),
        ("authorization: basic dXNlcjpwYXNz", "authorization: basic ***"),
        ("postgresql://me:pass:word@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg://me:x@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://me@host/db and a@b", "postgresql://me@host/db and a@b"),
        ("acc_short and accuracy 0.5", "acc_short and accuracy 0.5"),
        ("http://localhost:8765/x@y", "http://localhost:8765/x@y"),
    ],
)
def test_secrets_are_struck_out(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize("as_json", [True, False])
def test_setup_sends_all_to_stderr_once(
    plain_root: logging.Logger, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    logs.setup(as_json)
    logs.setup(as_json)
    logging.getLogger("tuner.session").info("hello %s", SECRET)
    logging.getLogger("httpx").info("not this")
    logging.getLogger("uvicorn.access").info("nor this")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "hello acc_***" in err
    assert err.startswith("{") is as_json


def lines(
    caplog: pytest.LogCaptureFixture,
) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == "server.access"]


def test_a_request_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with guarded(on_sqlite(tmp_path)) as client:
        headers = bearer(client, Scope.READ, name="team") | {"X-Request-ID": "mine"}
        caplog.clear()
        client.get("/v1/jobs/" + "0" * 26 + "?x=secret", headers=headers)
        client.get("/healthz")
    first, second = lines(caplog)
    assert first["status"] == 404
    assert first["route"] == "/v1/jobs/{job_id:id}"
    assert first["path"] == "/v1/jobs/" + "0" * 26
    assert first["job_id"] == "0" * 26
    assert first["owner"] == "team"
    assert first["token_id"]
    assert first["duration_ms"] > 0
    assert second["status"] == 200
    assert "owner" not in second


def test_what_a_request_logs_bears_its_id(
    tmp_path: Path, plain_root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.setup(as_json=True)
    app = create_app(on_sqlite(tmp_path))

    @app.get("/log")
    def log() -> None:  # in a thread of the pool
        logging.getLogger("server.jobs").info("working")

    @app.get("/fault")
    def fault() -> None:
        raise RuntimeError("for a reason")

    with LocalClient(app, raise_server_exceptions=False) as client:
        for path in ("/log", "/fault"):
            client.get(path, headers={"X-Request-ID": f"id-of-{path[1:]}"})
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    named = {(line["logger"], line.get("request_id")) for line in told}
    assert ("server.jobs", "id-of-log") in named
    assert ("server.access", "id-of-log") in named
    assert ("server.problems", "id-of-fault") in named
    assert any("for a reason" in line.get("traceback", "") for line in told)


def test_nothing_secret_is_logged(
    tmp_path: Path, plain_root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.setup(as_json=True, level="DEBUG")
    with guarded(on_sqlite(tmp_path)) as client:
        admin = bearer(client, Scope.ADMIN)
        body = {"name": "ci", "scopes": ["read"]}
        secret = client.post("/v1/tokens", json=body, headers=admin).json()["token"]
        client.get("/v1/jobs", headers={"Authorization": f"Bearer {secret}"})
        client.get(f"/v1/jobs?token={secret}", headers={"Authorization": f"Basic {secret}"})
        client.get(f"/{secret}")
        client.cookies.set(SESSION_COOKIE, SESSION)
        client.get("/v1/jobs")
        key = app_of(client).state.services.sessions._key.hex()
    told = capsys.readouterr().err
    assert told.count("server.access") == 5
    for hidden in (secret, admin["Authorization"][7:], SESSION, key):
        assert hidden not in told
