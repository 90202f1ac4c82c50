"""Which uploads a job's parameters name, and whether they are its owner's."""

from collections.abc import Iterator, Mapping
from typing import Any

from server.assets import Assets
from server.errors import InvalidError, NotFoundError
from tuner.recipes.assets import FORMAT

_ALTERNATIVES = ("anyOf", "allOf", "oneOf")


def check(assets: Assets, schema: Mapping[str, Any], params: Mapping[str, Any], owner: str) -> None:
    """Raise InvalidError unless the owner has every upload that the parameters name.

    `schema` is that of the recipe's parameters; where its `format` is `asset`, the value is the
    SHA-256 of an upload, and `contentMediaType` names its kind. Who reads a job sees the digests
    in it: to know one must not be enough to compute with what another owner uploaded.
    """
    named = dict.fromkeys(_named(schema, params, "/params", schema))
    errors = [
        {"detail": reason, "pointer": pointer}
        for pointer, asset_id, kind in named
        if (reason := _reason(assets, asset_id, kind, owner)) is not None
    ]
    if errors:
        raise InvalidError(f"{errors[0]['pointer']}: {errors[0]['detail']}", errors=errors)


def upload_kind(schema: Mapping[str, Any]) -> str | None:
    """Return the kind of the uploads that values of a schema name, None where they name none."""
    if schema.get("format") != FORMAT:
        return None
    kind: str = schema.get("contentMediaType", "").rpartition("/")[2]
    return kind


def _reason(assets: Assets, asset_id: str, kind: str, owner: str) -> str | None:
    """Return what is wrong with an upload, None where it can be used."""
    try:
        found = assets.get(asset_id, owner)
    except NotFoundError:
        return f"you have no upload {asset_id[:12]}…: POST /v1/assets first"
    if kind and found.kind != kind:
        return f"upload {asset_id[:12]}… is of the kind {found.kind}, not {kind}"
    return None


def _named(
    schema: Mapping[str, Any], value: Any, pointer: str, root: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield the pointer, the digest and the kind of all uploads that a value names."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    kind = upload_kind(schema)
    if kind is not None and isinstance(value, str):
        yield pointer, value, kind
    for name in _ALTERNATIVES:
        for alternative in schema.get(name, ()):
            yield from _named(alternative, value, pointer, root)
    for key, part in _parts(schema, value):
        shown = str(key).replace("~", "~0").replace("/", "~1")
        yield from _named(part, value[key], f"{pointer}/{shown}", root)


def _parts(schema: Mapping[str, Any], value: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield the keys of what a value holds, with the schema of each."""
    if isinstance(value, dict):
        for key in value:
            part = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(part, dict):
                yield key, part
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        for index in range(len(value)):
            part = first[index] if index < len(first) else schema.get("items")
            if isinstance(part, dict):
                yield index, part
