"""Artifacts over HTTP: listed, downloaded whole and in parts, and never outside of their folder."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.jobs import Jobs
from server.settings import Settings
from tests.server.helpers import succeeded

DATA = bytes(range(256)) * 2000  # two chunks, and a bit
SHA256 = hashlib.sha256(DATA).hexdigest()
TAG = f'"{SHA256}"'
NAME = "weights é.safetensors"


def _row(name: str = NAME, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "media_type": "application/octet-stream",
        "size_bytes": len(DATA),
        "sha256": SHA256,
    } | fields


@pytest.fixture
def file(settings: Settings, jobs: Jobs, database_url: str) -> Path:
    """The file of the one artifact of a job; its folder is named by the job's id."""
    job_id = succeeded(jobs, database_url, artifacts=[_row()])
    path = settings.artifacts_dir / job_id / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    return path


def _href(client: TestClient, file: Path) -> str:
    page = client.get(f"/v1/jobs/{file.parent.name}/artifacts").json()
    (item,) = page["items"]
    href: str = item["href"]
    return href


def test_artifacts_are_listed(client: TestClient, file: Path) -> None:
    page = client.get(f"/v1/jobs/{file.parent.name}/artifacts").json()
    (item,) = page["items"]
    assert (item["name"], item["size_bytes"], item["sha256"]) == (NAME, len(DATA), SHA256)
    assert item["created_at"].endswith("Z")
    assert page["next_cursor"] is None


def test_a_file_comes_whole(client: TestClient, file: Path) -> None:
    href = _href(client, file)
    assert href.isascii()
    answer = client.get(href)
    assert (answer.status_code, answer.content) == (200, DATA)
    headers = answer.headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-length"] == str(len(DATA))
    assert headers["etag"] == TAG
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] == (
        "attachment; filename*=utf-8''weights%20%C3%A9.safetensors"
    )
    head = client.head(href)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "content-disposition", "content-type", "accept-ranges"):
        assert head.headers[name] == headers[name]


def test_a_file_that_is_known_does_not_come_again(client: TestClient, file: Path) -> None:
    answer = client.get(_href(client, file), headers={"If-None-Match": TAG})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", TAG)


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("0-0", 0, 1), ("300-399", 300, 400), ("511990-", 511_990, 512_000), ("-5", 511_995, 512_000)],
)
def test_a_part_of_a_file(asked: str, begin: int, end: int, client: TestClient, file: Path) -> None:
    href = _href(client, file)
    for condition in ({}, {"If-Range": TAG}):
        answer = client.get(href, headers={"Range": f"bytes={asked}", **condition})
        assert (answer.status_code, answer.content) == (206, DATA[begin:end])
        assert answer.headers["content-range"] == f"bytes {begin}-{end - 1}/{len(DATA)}"
        assert answer.headers["content-length"] == str(end - begin)


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=0-4", "If-Range": '"other"'},
        {"Range": "bytes=0-4", "If-Range": f"W/{TAG}"},
        {"Range": "bytes=0-4", "If-Range": "Sat, 21 Nov 2026 16:00:00 GMT"},
        {"Range": "bytes=0-1,4-5"},
        {"Range": "nonsense"},
    ],
)
def test_the_whole_file_comes_where_a_part_cannot(
    headers: dict[str, str], client: TestClient, file: Path
) -> None:
    answer = client.get(_href(client, file), headers=headers)
    assert (answer.status_code, answer.content) == (200, DATA)


def test_a_part_beyond_the_end_is_refused(client: TestClient, file: Path) -> None:
    answer = client.get(_href(client, file), headers={"Range": "bytes=512000-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */512000"
    assert answer.headers["content-type"] == "application/problem+json"


def test_an_empty_file_comes_too(
    client: TestClient, settings: Settings, jobs: Jobs, database_url: str
) -> None:
    job_id = succeeded(jobs, database_url, artifacts=[_row("empty", size_bytes=0)])
    path = settings.artifacts_dir / job_id / "empty"
    path.parent.mkdir(parents=True)
    path.touch()
    answer = client.get(f"/v1/jobs/{job_id}/artifacts/empty")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "name",
    [
        "other",
        "../secret",
        "..%2Fsecret",
        "%2e%2e/secret",
        "%2e%2e%2fsecret",
        "a%00",
        "x" * 300,
    ],
)
def test_only_stored_names_are_found(
    name: str, client: TestClient, file: Path, settings: Settings
) -> None:
    (settings.artifacts_dir / "secret").write_text("secret")
    answer = client.get(f"/v1/jobs/{file.parent.name}/artifacts/{name}")
    assert answer.status_code == 404
    assert "secret" not in answer.text.replace(name, "").replace("/secret", "")


def test_not_even_a_stored_name_leads_outside(
    client: TestClient, settings: Settings, jobs: Jobs, database_url: str
) -> None:
    settings.artifacts_dir.mkdir(parents=True)
    (settings.artifacts_dir / "secret").write_bytes(DATA)
    rows = [_row(".."), _row("link")]
    job_id = succeeded(jobs, database_url, artifacts=rows)
    folder = settings.artifacts_dir / job_id
    folder.mkdir()
    (folder / "link").symlink_to(settings.artifacts_dir / "secret")
    assert client.get(f"/v1/jobs/{job_id}/artifacts/link").status_code == 404
    assert client.get(f"/v1/jobs/{job_id}/artifacts/%2e%2e").status_code == 404


def test_a_file_that_is_gone_or_damaged_is_said(client: TestClient, file: Path) -> None:
    href = _href(client, file)
    file.write_bytes(DATA[:-1])
    answer = client.get(href)
    assert (answer.status_code, "damaged" in answer.json()["detail"]) == (404, True)
    file.unlink()
    for answer in (client.get(href), client.head(href)):
        assert answer.status_code == 404
