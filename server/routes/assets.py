"""Uploads of weights and data: safetensors and npz, nothing that could hold code."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response, status
from starlette.requests import ClientDisconnect

from server import cursors
from server.assets import Kind
from server.errors import InvalidError
from server.problems import declared
from server.routes.common import Cursor, Reader, Submitter, UsesServices, cut
from server.schemas import Asset, Name, Page

router = APIRouter(prefix="/v1/assets", tags=["assets"])

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BODY = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
_AssetId = Annotated[
    str, Path(description="The SHA-256 of the upload's bytes.", pattern=r"^[0-9a-f]{64}$")
]


@router.post(
    "",
    operation_id="upload_asset",
    summary="Upload weights or data",
    status_code=status.HTTP_201_CREATED,
    response_model=Asset,
    responses={
        200: {"model": Asset, "description": "You had uploaded the same bytes before."},
        **declared(413, 415, 507),
    },
    openapi_extra={"requestBody": _BODY},
)
async def upload_asset(
    request: Request,
    response: Response,
    services: UsesServices,
    caller: Submitter,
    kind: Kind,
    name: Annotated[Name, Query(description="For people; it need not be unique.")],
) -> Asset:
    """Keep the body, a safetensors file or an npz of plain arrays, for recipes to use."""
    try:
        asset, is_new = await services.assets.store(request.stream(), caller.owner, kind, name)
    except ClientDisconnect as error:
        raise InvalidError("the upload broke off") from error
    if not is_new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = f"/v1/assets/{asset.id}"
    return asset


@router.get("", operation_id="list_assets", summary="List your uploads")
def list_assets(
    services: UsesServices,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Cursor = None,
) -> Page[Asset]:
    """Return your own uploads, the newest first."""
    before = None if cursor is None else _place(cursors.decode("assets", cursor))
    items, last = cut(services.assets.page(caller.owner, limit + 1, before), limit)
    return Page[Asset](items=items, next_cursor=None if last is None else _cursor(last))


@router.get(
    "/{asset_id}", operation_id="get_asset", summary="Get an upload", responses=declared(404)
)
def get_asset(asset_id: _AssetId, services: UsesServices, caller: Reader) -> Asset:
    """Return one of your uploads."""
    return services.assets.get(asset_id, caller.owner)


@router.delete(
    "/{asset_id}",
    operation_id="delete_asset",
    summary="Delete an upload",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=declared(404),
)
def delete_asset(asset_id: _AssetId, services: UsesServices, caller: Submitter) -> None:
    """Forget one of your uploads; a job that names it and has not begun will fail."""
    services.assets.delete(asset_id, caller.owner)


def _cursor(asset: Asset) -> str:
    microseconds = (asset.created_at - _EPOCH) // timedelta(microseconds=1)
    return cursors.encode("assets", f"{microseconds}x{asset.id}")


def _place(text: str) -> tuple[datetime, str]:
    """Return the time and the id that a cursor stands for."""
    microseconds, _, asset_id = text.partition("x")
    if not microseconds.isdecimal() or len(microseconds) > 16 or not asset_id:
        raise InvalidError(
            "not a cursor of this list: give what `next_cursor` of its last page was"
        )
    return _EPOCH + timedelta(microseconds=int(microseconds)), asset_id
