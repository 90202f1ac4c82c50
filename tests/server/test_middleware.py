"""What every request passes: its name, host, origin, rate and body; and what every answer gets."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import Response
from fastapi.testclient import TestClient

from server import limits, middleware
from server.app import create_app
from server.auth import Scope
from server.limits import Buckets
from server.middleware import Hosts
from server.settings import Settings
from tests.server.access import LocalClient, app_of, bearer, guarded, on_sqlite

_MOST_BYTES = 10_000
JSON = {"Content-Type": "application/json"}
BODY = {"recipe": "digits-resnet"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("middleware")


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[TestClient]:
    """A client of a service for this machine alone."""
    app = create_app(on_sqlite(folder / "local", max_body_bytes=_MOST_BYTES))
    with LocalClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def strict(folder: Path) -> Iterator[TestClient]:
    """A client of a service that needs tokens."""
    with guarded(on_sqlite(folder / "strict", max_body_bytes=_MOST_BYTES)) as client:
        yield client


def test_every_answer_has_the_headers_that_keep_browsers_safe(strict: TestClient) -> None:
    answers = [
        strict.get("/healthz"),
        strict.get("/v1/jobs"),
        strict.get("/nothing"),
        strict.get("/healthz", headers={"Host": "evil.example"}),
        strict.post("/v1/jobs", headers={"Origin": "https://evil.example"}),
        strict.post("/v1/jobs", content=b"x" * (_MOST_BYTES + 1), headers=JSON),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 404, 400, 403, 413]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        for part in ("form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
            assert part in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-request-id"]
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_fault_of_the_service_is_a_problem_with_the_same_headers(folder: Path) -> None:
    app = create_app(on_sqlite(folder / "faulty"))

    @app.get("/fault")
    def fault() -> None:
        raise RuntimeError("the secret reason")

    with LocalClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/fault", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "mine"
    assert "content-security-policy" in answer.headers
    assert "secret" not in answer.text


def test_a_route_may_set_a_header_of_its_own(folder: Path) -> None:
    app = create_app(on_sqlite(folder / "own"))

    @app.get("/own")
    def own() -> Response:
        return Response(headers={"Content-Security-Policy": "sandbox"})

    with LocalClient(app) as client:
        answer = client.get("/own")
    assert answer.headers.get_list("content-security-policy") == ["sandbox"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8765", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8765", 200),
        ("evil.example", 400),
        ("evil.example:8765", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost@evil.example", 400),
        ("localhost:8765:evil", 400),
        ("localhost:port", 400),
        ("127.0.0.1, evil.example", 400),
        ("[::1", 400),
        ("", 400),
    ],
)
def test_which_hosts_are_answered(local: TestClient, host: str, expected: int) -> None:
    answer = local.get("/healthz", headers={"Host": host})
    assert answer.status_code == expected
    if expected == 400:
        assert answer.json()["type"].endswith("unknown-host")


def test_two_hosts_are_one_too_many(local: TestClient) -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert local.get("/healthz", headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("fields", "host", "expected"),
    [
        ({"host": "192.168.1.5"}, "192.168.1.5:80", 200),
        ({"host": "fd00::5"}, "[fd00::5]:80", 200),
        ({"host": "0.0.0.0"}, "0.0.0.0", 400),
        ({"allowed_hosts": ("tuner.example",)}, "Tuner.example", 200),
        ({"allowed_hosts": ("tuner.example",)}, "localhost", 400),
        ({"allowed_hosts": ("*",)}, "what.ever", 200),
    ],
)
def test_the_operator_names_the_hosts(
    tmp_path: Path, fields: dict[str, object], host: str, expected: int
) -> None:
    names = middleware._hosts(on_sqlite(tmp_path, **fields))
    client = LocalClient(Hosts(Response("here"), names))
    assert client.get("/", headers={"Host": host}).status_code == expected


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1"}, False),
        ({"Origin": "http://127.0.0.1"}, True),
        ({"Origin": "https://127.0.0.1"}, True),
        ({"Origin": "http://127.0.0.1:81"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://127.0.0.1.evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
    ],
)
def test_pages_of_other_sites_only_read(
    local: TestClient, headers: dict[str, str], is_own: bool
) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = local.request(method, "/v1/tokens", headers=headers)
        assert (answer.status_code != 403) is is_own
        if not is_own:
            assert answer.json()["type"].endswith("cross-site")
    assert local.get("/v1/jobs", headers=headers).status_code == 200


def test_other_sites_get_no_leave_to_read(local: TestClient) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = local.options("/v1/jobs", headers=asked)
    assert answer.status_code == 405
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("size", [_MOST_BYTES, _MOST_BYTES + 1])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_body_is_limited_while_it_streams(
    local: TestClient, size: int, is_streamed: bool
) -> None:
    body = b"{" + b" " * (size - 1)
    content = iter([body[:5000], body[5000:]]) if is_streamed else body
    answer = local.post("/v1/jobs", content=content, headers=JSON)
    assert answer.status_code == (413 if size > _MOST_BYTES else 400)
    assert answer.headers["content-type"] == "application/problem+json"
    if size > _MOST_BYTES:
        assert answer.json()["max_bytes"] == _MOST_BYTES


def test_a_stream_that_is_too_long_is_not_read_to_its_end(local: TestClient) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100 * _MOST_BYTES:
            sent += 1000
            yield b" " * 1000

    assert local.post("/v1/jobs", content=endless(), headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("/v1/jobs", "application/json", 422),
        ("/v1/jobs", "Application/JSON; charset=utf-8", 422),
        ("/v1/jobs", "text/plain", 415),
        ("/v1/jobs", "application/x-www-form-urlencoded", 415),
        ("/v1/jobs", "multipart/form-data; boundary=x", 415),
        ("/v1/jobs", "application/octet-stream", 415),
        ("/v1/jobs", "", 415),
        ("/v1/assets?kind=npz&name=n", "application/octet-stream", 422),
        ("/v1/assets?kind=npz&name=n", "application/json", 415),
        ("/v1/assets/", "application/octet-stream", 415),
        ("/nothing", "multipart/form-data; boundary=x", 415),
        ("/nothing", "application/x-www-form-urlencoded", 404),
    ],
)
def test_which_kinds_of_bodies_are_taken(
    local: TestClient, path: str, kind: str, expected: int
) -> None:
    answer = local.post(path, content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == expected


def test_a_post_without_a_body_needs_no_kind(local: TestClient) -> None:
    assert local.post(f"/v1/jobs/{'0' * 26}:cancel").status_code == 404


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 64])
def test_a_sane_request_id_is_kept(local: TestClient, given: str) -> None:
    headers = {"X-Request-ID": given}
    assert local.get("/healthz", headers=headers).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "ü", '"},{"'])
def test_another_request_id_is_made(local: TestClient, given: str) -> None:
    headers = {"X-Request-ID": given.encode()}
    made = local.get("/healthz", headers=headers).headers["x-request-id"]  # type: ignore[arg-type]
    assert re.fullmatch(r"[0-9a-z]{26}", made)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_refills_evenly() -> None:
    clock = Clock()
    buckets = Buckets(6, clock)
    assert [buckets.take("a") for _ in range(7)] == [0] * 6 + [10]
    assert buckets.take("b") == 0
    clock.now += 4
    assert buckets.take("a") == 6
    clock.now += 6
    assert [buckets.take("a"), buckets.take("a")] == [0, 10]
    clock.now += 1e6
    assert [buckets.take("a") for _ in range(7)] == [0] * 6 + [10]


def test_many_addresses_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MOST_BUCKETS", 10)
    buckets = Buckets(1, Clock())
    for number in range(100):
        buckets.take(f"address {number}")
    assert len(buckets._left) == 10


def limited(settings: Settings) -> Settings:
    return settings.model_copy(update={"requests_per_minute": 5})


def test_who_calls_too_often_has_to_wait(tmp_path: Path) -> None:
    with guarded(limited(on_sqlite(tmp_path))) as client:
        one, other = (bearer(client, Scope.READ, name=name) for name in ("one", "other"))
        answers = [client.get("/v1/jobs", headers=one) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        refused = answers[-1]
        assert 1 <= int(refused.headers["retry-after"]) <= 12
        assert refused.json()["retry_after_s"] == int(refused.headers["retry-after"])
        assert client.get("/v1/jobs", headers=other).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_who_guesses_tokens_has_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(limited(on_sqlite(tmp_path))) as client:
        tokens = app_of(client).state.services.tokens
        looked_up: list[str] = []
        monkeypatch.setattr(type(tokens), "find", lambda self, secret: looked_up.append(secret))
        guesses = [{"Authorization": f"Bearer acc_{number}"} for number in range(9)]
        statuses = [client.get("/v1/jobs", headers=guess).status_code for guess in guesses]
        assert statuses == [401] * 5 + [429] * 4
        assert len(looked_up) == 5


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (("a socket", 1), "a socket"),
        (None, "unknown"),
    ],
)
def test_an_address_stands_for_one_caller(client: object, expected: str) -> None:
    assert limits._address({"client": client}) == expected
