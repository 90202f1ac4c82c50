"""Uploads are kept whole or not at all; what is hostile is refused, and none of it run."""

import asyncio
import errno
import hashlib
import io
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load as load_safetensors

from server import assets as module
from server import npz_file, safetensors_file
from server.assets import Assets
from server.auth import Scope
from server.db import Database
from server.errors import (
    DatabaseError,
    InvalidError,
    NotFoundError,
    QuotaError,
    StorageFullError,
    TooLargeError,
)
from server.settings import Settings
from tests.server import hostile
from tests.server.access import bearer, guarded, with_changes

_MOST_BYTES = 1 << 20
SOUND = hostile.sound_npz()


@pytest.fixture
def assets(database: Database, settings: Settings) -> Assets:
    return Assets(database, with_changes(settings, max_asset_bytes=_MOST_BYTES))


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with guarded(settings, max_asset_bytes=_MOST_BYTES) as client:
        yield client


async def in_chunks(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


def store(
    assets: Assets, data: bytes, owner: str = "me", kind: module.Kind = "npz", name: str = "n"
) -> tuple[module.Asset, bool]:
    return asyncio.run(assets.store(in_chunks(data), owner, kind, name))


def files(assets: Assets) -> set[str]:
    return {path.name for path in assets._folder.iterdir()}


@pytest.mark.parametrize("case", hostile.NPZ)
def test_a_hostile_npz_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(hostile.NPZ[case]())
    with pytest.raises(InvalidError):
        npz_file.check(path, _MOST_BYTES)


@pytest.mark.parametrize("case", hostile.SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(hostile.SAFETENSORS[case]())
    with pytest.raises(InvalidError):
        safetensors_file.check(path)


# The libraries refuse some of these, too: these words are those of our own check.
_OWN_WORDS = {
    "overlapping members": "overlaps another one",
    "zip64": "too large for a plain zip",
    "a huge directory": "at most 1024",
    "something before": "does not begin as",
    "a pickle behind a key that comes twice": "without fields",
    "nested": "without fields",
    "an expression": "without fields",
}
_OWN_SAFETENSORS_WORDS = {
    "overlapping": "overlaps another one",
    "a gap": "leaves a gap",
    "bytes of no tensor": "belong to no tensor",
    "a very long header": "at most 8388608",
    "true for an axis": "no shape that is allowed",
}


@pytest.mark.parametrize("case", _OWN_WORDS)
def test_our_own_check_of_an_npz_comes_first(case: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(hostile.NPZ[case]())
    with pytest.raises(InvalidError, match=_OWN_WORDS[case]):
        npz_file.check(path, _MOST_BYTES)


@pytest.mark.parametrize("case", _OWN_SAFETENSORS_WORDS)
def test_our_own_check_of_safetensors_comes_first(case: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(hostile.SAFETENSORS[case]())
    with pytest.raises(InvalidError, match=_OWN_SAFETENSORS_WORDS[case]):
        safetensors_file.check(path)


def _arrays() -> dict[str, Any]:
    kinds = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64")
    arrays: dict[str, Any] = {kind: np.ones((2, 3), kind) for kind in kinds}
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    return arrays | {"fortran": fortran, "a number": np.array(3), "none": np.zeros((0, 4))}


@pytest.mark.parametrize("compress", [False, True])
def test_what_numpy_writes_is_taken(compress: bool, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(hostile.sound_npz(compress, **_arrays()))
    npz_file.check(path, _MOST_BYTES)
    with np.load(path, allow_pickle=False) as loaded:
        assert set(loaded) == set(_arrays())


def test_versions_of_npy_and_its_limit_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
    path.write_bytes(hostile.zipped({"x.npy": hostile.npy(header, b"\0" * 8, b"\x02\x00")}))
    npz_file.check(path, _MOST_BYTES)
    with pytest.raises(InvalidError, match="unpacks to"):
        npz_file.check(path, 64)


def test_what_safetensors_writes_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(hostile.sound_safetensors())
    safetensors_file.check(path)
    assert set(load_safetensors(path.read_bytes())) == {"w", "b"}


def test_a_message_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(hostile.NPZ["an object array"]())
    with pytest.raises(InvalidError, match=r"'x.npy'.*'\|O'.*bool, int, uint and float"):
        npz_file.check(path, _MOST_BYTES)
    path.write_bytes(hostile.SAFETENSORS["overlapping"]())
    with pytest.raises(InvalidError, match="tensor 'b' overlaps"):
        safetensors_file.check(path)


def test_an_upload_is_named_by_its_bytes(assets: Assets) -> None:
    asset, is_new = store(assets, SOUND, name="digits")
    assert is_new
    assert asset.id == hashlib.sha256(SOUND).hexdigest()
    assert (asset.name, asset.kind, asset.size_bytes) == ("digits", "npz", len(SOUND))
    path = assets.path(asset.id, "me")
    assert path.read_bytes() == SOUND
    assert path.stat().st_mode & 0o077 == 0
    assert files(assets) == {asset.id}
    assert assets.get(asset.id, "me") == asset


def test_the_same_bytes_are_kept_once(assets: Assets) -> None:
    first, _ = store(assets, SOUND, name="one")
    again, is_new = store(assets, SOUND, name="two")
    assert (again, is_new) == (first, False)
    other, is_new = store(assets, SOUND, owner="you", name="three")
    assert is_new
    assert (other.id, other.name) == (first.id, "three")
    assert files(assets) == {first.id}


def test_each_owner_sees_only_what_is_theirs(assets: Assets) -> None:
    asset, _ = store(assets, SOUND)
    for look in (assets.get, assets.path, assets.delete):
        with pytest.raises(NotFoundError):
            look(asset.id, "you")
    assert assets.page("you", 10) == []
    assert assets.get(asset.id, "me") == asset


def test_the_file_goes_with_its_last_owner(assets: Assets) -> None:
    asset, _ = store(assets, SOUND)
    store(assets, SOUND, owner="you")
    assets.delete(asset.id, "me")
    assert assets.path(asset.id, "you").read_bytes() == SOUND
    assets.delete(asset.id, "you")
    assert files(assets) == set()
    with pytest.raises(NotFoundError):
        assets.delete(asset.id, "you")
    assert store(assets, SOUND)[1]


def test_a_delete_that_is_rolled_back_leaves_the_file(
    assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset, _ = store(assets, SOUND)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path.name == asset.id:
            raise DatabaseError("the disk is full")
        return moved

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(DatabaseError):
        assets.delete(asset.id, "me")
    assert assets.path(asset.id, "me").read_bytes() == SOUND


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_nothing_is_left_of_what_is_refused(assets: Assets, kind: module.Kind) -> None:
    with pytest.raises(InvalidError):
        store(assets, b"PK\x03\x04 but no more", kind=kind)
    with pytest.raises(TooLargeError):
        store(assets, b"\0" * (_MOST_BYTES + 1), kind=kind)
    assert files(assets) == set()
    assert assets.page("me", 10) == []


def test_nothing_is_left_of_what_breaks_off(assets: Assets) -> None:
    async def breaks_off() -> AsyncIterator[bytes]:
        yield SOUND[:100]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        asyncio.run(assets.store(breaks_off(), "me", "npz", "n"))
    assert files(assets) == set()


def test_what_a_killed_process_left_is_swept(assets: Assets) -> None:
    store(assets, SOUND)
    old, young = (assets._folder / f"{name}.incoming" for name in ("old", "young"))
    for path in (old, young):
        path.touch()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    store(assets, SOUND)
    assert not old.exists()
    assert young.exists()


def test_a_lost_file_is_healed_by_the_same_upload(assets: Assets) -> None:
    asset, _ = store(assets, SOUND)
    (assets._folder / asset.id).unlink()
    with pytest.raises(NotFoundError, match="upload it again"):
        assets.path(asset.id, "me")
    store(assets, SOUND)
    assert assets.path(asset.id, "me").read_bytes() == SOUND


def test_the_quota_is_the_owners(database: Database, settings: Settings) -> None:
    quota = 2 * len(SOUND) + 10
    assets = Assets(database, with_changes(settings, asset_quota_bytes=quota))
    other, more = (hostile.sound_npz(z=np.full(15, number)) for number in (1.0, 2.0))
    first, _ = store(assets, SOUND)
    store(assets, other)
    with pytest.raises(QuotaError):
        store(assets, more)
    assert not store(assets, SOUND)[1]
    assert store(assets, more, owner="you")[1]
    assets.delete(first.id, "me")
    assert store(assets, more)[1]
    assert len(files(assets)) == 2


def test_uploads_at_the_same_moment_keep_to_the_quota_and_one_file(
    database: Database, settings: Settings
) -> None:
    several = [hostile.sound_npz(z=np.full(15, float(number))) for number in range(4)]
    quota = 2 * len(several[0])
    assets = Assets(database, with_changes(settings, asset_quota_bytes=quota))
    outcomes: list[str] = []

    def upload(data: bytes, owner: str) -> None:
        try:
            outcomes.append(f"{owner} {store(assets, data, owner)[1]}")
        except QuotaError:
            outcomes.append(f"{owner} quota")

    work = [(data, "me") for data in several] + [(SOUND, "you")] * 4
    threads = [threading.Thread(target=upload, args=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = ["me True"] * 2 + ["me quota"] * 2 + ["you True"] + ["you False"] * 3
    assert sorted(outcomes) == sorted(expected)
    assert len(files(assets)) == 3


def test_a_full_disk_is_told(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=module._RESERVED_BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StorageFullError):
            store(assets, SOUND)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError):
        store(assets, SOUND)
    assert files(assets) == set()


def test_uploads_over_http(client: TestClient) -> None:
    mine = bearer(client, Scope.SUBMIT, name="me")
    octets = mine | {"Content-Type": "application/octet-stream"}
    where = {"kind": "npz", "name": "digits ü"}
    made = client.post("/v1/assets", params=where, content=SOUND, headers=octets)
    assert made.status_code == 201
    asset = made.json()
    assert asset["id"] == hashlib.sha256(SOUND).hexdigest()
    assert asset["name"] == "digits ü"
    path = made.headers["location"]
    assert path == f"/v1/assets/{asset['id']}"
    again = client.post("/v1/assets", params=where, content=SOUND, headers=octets)
    assert (again.status_code, again.json()) == (200, asset)
    assert client.get(path, headers=mine).json() == asset
    assert client.get("/v1/assets", headers=mine).json() == {"items": [asset], "next_cursor": None}
    other = bearer(client, Scope.ADMIN, name="you")
    assert client.get(path, headers=other).status_code == 404
    assert client.delete(path, headers=other).status_code == 404
    assert client.delete(path, headers=mine).status_code == 204
    assert client.get(path, headers=mine).status_code == 404


def test_what_is_refused_over_http(client: TestClient) -> None:
    octets = {"Content-Type": "application/octet-stream"} | bearer(client, Scope.SUBMIT)
    where = {"kind": "npz", "name": "n"}
    large = b"\0" * (_MOST_BYTES + 1)

    def status(content: Any, params: Any = where, **headers: str) -> int:
        sent = octets | headers
        answer = client.post("/v1/assets", params=params, content=content, headers=sent)
        assert answer.headers["content-type"].startswith("application/problem+json")
        return answer.status_code

    assert status(large) == 413
    assert status(iter([large[: 1 << 19]] * 3)) == 413
    assert status(b"hello") == 422
    assert status(SOUND, {"kind": "npz"}) == 422
    assert status(SOUND, {"kind": "pickle", "name": "n"}) == 422
    assert status(SOUND, {"kind": "npz", "name": ""}) == 422
    assert status(SOUND, {"kind": "npz", "name": "a\0b"}) == 422
    assert status(SOUND, {"kind": "safetensors", "name": "n"}) == 422
    kind = {"Content-Type": "application/json"}
    assert status(SOUND, **kind) == 415
    assert client.get("/v1/assets", headers=octets).json()["items"] == []


def test_uploads_are_listed_in_pages(client: TestClient) -> None:
    headers = {"Content-Type": "application/octet-stream"} | bearer(client, Scope.SUBMIT)
    made = []
    for number in range(5):
        data, name = hostile.sound_npz(z=np.array(number)), f"n{number}"
        where = {"kind": "npz", "name": name}
        made.append(client.post("/v1/assets", params=where, content=data, headers=headers).json())
    seen: list[Any] = []
    query = {"limit": "2"}
    while True:
        page = client.get("/v1/assets", params=query, headers=headers).json()
        seen += page["items"]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == made[::-1]
    assert client.get("/v1/assets?cursor=eHg", headers=headers).status_code == 422


def test_an_id_that_is_no_digest_is_not_found(client: TestClient) -> None:
    headers = bearer(client, Scope.SUBMIT)
    for wrong in ("x", "..%2f..%2fetc%2fpasswd", "%00", "A" * 64):
        assert client.get(f"/v1/assets/{wrong}", headers=headers).status_code == 404
        assert client.delete(f"/v1/assets/{wrong}", headers=headers).status_code == 404


def test_a_pickle_inside_would_run_code_if_it_were_loaded() -> None:
    data = io.BytesIO(hostile.NPZ["a pickled member"]())
    with pytest.raises(SystemExit, match="unpickled"):
        np.load(data, allow_pickle=True)["x"]
