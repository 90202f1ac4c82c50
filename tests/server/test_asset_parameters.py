"""A job may name only its owner's uploads, wherever they stand in its parameters."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from server import asset_parameters
from server.app import create_app
from server.assets import Assets, Kind
from server.auth import Scope
from server.db import Database, upgrade
from server.errors import InvalidError
from tests.server import hostile
from tests.server.access import LocalClient, bearer, guarded, on_sqlite
from tuner.recipes.assets import NpzId, SafetensorsId

NPZ, WEIGHTS = hostile.sound_npz(), hostile.sound_safetensors()
NPZ_ID, WEIGHTS_ID = (hashlib.sha256(data).hexdigest() for data in (NPZ, WEIGHTS))


class Inner(BaseModel):
    data: NpzId


class Outer(BaseModel):
    weights: SafetensorsId | None = None
    several: list[Inner | int] = []
    pair: tuple[int, NpzId] | None = None
    by_name: dict[str, NpzId] = {}
    note: str = ""


@pytest.fixture
def assets(tmp_path: Path) -> Iterator[Assets]:
    settings = on_sqlite(tmp_path)
    database = Database(settings.database)
    upgrade(database)
    assets = Assets(database, settings)
    put(assets, "npz", NPZ)
    put(assets, "safetensors", WEIGHTS)
    yield assets
    database.close()


def put(assets: Assets, kind: Kind, data: bytes) -> None:
    async def whole() -> AsyncIterator[bytes]:
        yield data

    asyncio.run(assets.store(whole(), "me", kind, "n"))


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "in a union": ({"weights": WEIGHTS_ID}, "/params/weights"),
    "in a list of models": ({"several": [1, {"data": NPZ_ID}]}, "/params/several/1/data"),
    "in a tuple": ({"pair": [1, NPZ_ID]}, "/params/pair/1"),
    "in a mapping": ({"by_name": {"a/b": NPZ_ID}}, "/params/by_name/a~1b"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_upload_is_its_owners(assets: Assets, case: str) -> None:
    params, pointer = CASES[case]
    schema = Outer.model_json_schema()
    Outer.model_validate(params)
    asset_parameters.check(assets, schema, params, "me")
    with pytest.raises(InvalidError) as caught:
        asset_parameters.check(assets, schema, params, "you")
    assert [error["pointer"] for error in caught.value.details["errors"]] == [pointer]


def test_an_upload_of_the_other_kind_is_refused(assets: Assets) -> None:
    with pytest.raises(InvalidError, match="is of the kind npz, not safetensors"):
        asset_parameters.check(assets, Outer.model_json_schema(), {"weights": NPZ_ID}, "me")


def test_what_only_looks_like_an_upload_is_none(assets: Assets) -> None:
    asset_parameters.check(assets, Outer.model_json_schema(), {"note": "0" * 64}, "me")


def test_an_architecture_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    params = {"architecture": "mpl", "weights": WEIGHTS_ID, "data": NPZ_ID}
    with LocalClient(create_app(on_sqlite(tmp_path))) as client:
        refused = client.post("/v1/jobs", json={"recipe": "arrays", "params": params})
    assert refused.status_code == 422
    told = "unknown architecture 'mpl'. Did you mean mlp?"
    assert refused.json()["errors"] == [{"detail": told, "pointer": "/params"}]


def test_nobody_submits_a_job_with_what_another_uploaded(tmp_path: Path) -> None:
    mlp = {"architecture": "mlp", "architecture_params": {"inputs": 1, "outputs": 1}}
    body = {"recipe": "arrays", "params": {**mlp, "weights": WEIGHTS_ID, "data": NPZ_ID}}
    with guarded(on_sqlite(tmp_path)) as client:
        me, you = (bearer(client, Scope.SUBMIT, name=name) for name in ("me", "you"))
        upload(client, me, "npz", NPZ)
        upload(client, me, "safetensors", WEIGHTS)
        assert client.post("/v1/jobs", json=body, headers=me).status_code == 202
        refused = client.post("/v1/jobs", json=body, headers=you)
    assert refused.status_code == 422
    pointers = {error["pointer"] for error in refused.json()["errors"]}
    assert pointers == {"/params/weights", "/params/data"}


def upload(client: TestClient, headers: dict[str, str], kind: str, data: bytes) -> None:
    sent = headers | {"Content-Type": "application/octet-stream"}
    where = {"kind": kind, "name": "n"}
    assert client.post("/v1/assets", params=where, content=data, headers=sent).status_code == 201
