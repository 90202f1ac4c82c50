"""The formats that a saved directory speaks of: they must mean the same where it is loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

from tuner import formats
from tuner.errors import SaveError, UnknownNameError

_FIELDS = ("format", "backward_format")


def definitions(document: Any) -> dict[str, Any]:
    """Return name → definition, as JSON, of every format that a JSON document names."""
    return {name: _definition(formats.get(name)) for name in dict.fromkeys(_names(document))}


def check_formats(document: Any, saved: Mapping[str, Any]) -> None:
    """Raise SaveError for a format that is not registered, or is another than was saved."""
    for name in dict.fromkeys(_names(document)):
        try:
            here = _definition(formats.get(name))
        except UnknownNameError as error:
            raise SaveError(
                f"the format {name!r} was saved and is not registered here: call "
                f"formats.register({name!r}, …) as before saving, then load again"
            ) from error
        if saved.get(name, here) != here:
            raise SaveError(
                f"the format {name!r} is {here} here, and was {saved[name]} when the plan was "
                "saved: register the same one"
            )


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, Mapping):
        yield from (value[field] for field in _FIELDS if isinstance(value.get(field), str))
        for item in value.values():
            yield from _names(item)


def _definition(fmt: formats.Format) -> dict[str, Any]:
    block = None if fmt.block is None else [fmt.block.size, fmt.block.scale]
    return {
        "kind": fmt.kind,
        "bits": fmt.bits,
        "scaled": fmt.scaled,
        "block": block,
        "codebook": list(fmt.codebook),
    }
