"""Check an uploaded safetensors file without computing anything from it."""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from server.errors import InvalidError

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 8 << 20
_MOST_AXES = 32
_LARGEST = 1 << 62


def check(path: Path) -> None:
    """Raise InvalidError unless this is a safetensors file whose tensors fill it exactly.

    The file is: the header's length (8 bytes, little-endian), the header (JSON: per tensor dtype,
    shape and begin and end in what follows), the data. Tensors follow each other without a gap and
    without an overlap. Nothing of the data is read.
    """
    header, data_bytes = _read_header(path)
    spans = [
        _span(name, entry, data_bytes) for name, entry in header.items() if name != "__metadata__"
    ]
    if not spans:
        raise InvalidError("the safetensors file has no tensor")
    _check_metadata(header.get("__metadata__", {}))
    _check_spans(spans, data_bytes)
    try:  # what the recipes read it with must agree
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise InvalidError(f"not a safetensors file: {error}") from error
    if names != header.keys() - {"__metadata__"}:
        raise InvalidError("the safetensors file names other tensors than its header")


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header and the number of bytes after it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise InvalidError(
                f"not a safetensors file: its {size} bytes cannot hold a header of {length} bytes"
            )
        if length > _LONGEST_HEADER:
            raise InvalidError(
                f"the safetensors header has {length} bytes: at most {_LONGEST_HEADER} are taken"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidError("the safetensors header is not a JSON object")
    return header, size - _LENGTH_BYTES - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _span(name: str, entry: Any, data_bytes: int) -> tuple[int, int, str]:
    """Return where a tensor begins and ends, and its name."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidError(f"tensor {name[:100]!r} needs dtype, shape and data_offsets, no others")
    item_bytes = _ITEM_BYTES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if item_bytes is None:
        raise InvalidError(
            f"tensor {name[:100]!r} has dtype {str(entry['dtype'])[:20]!r}: allowed are "
            f"{', '.join(_ITEM_BYTES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise InvalidError(f"tensor {name[:100]!r} has no shape that is allowed")
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise InvalidError(f"tensor {name[:100]!r} does not lie inside of the file")
    if prod(shape) * item_bytes != offsets[1] - offsets[0]:
        raise InvalidError(
            f"tensor {name[:100]!r} of shape {shape} and dtype {entry['dtype']} does not have "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return offsets[0], offsets[1], name


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < _LARGEST for value in values
    )


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidError("__metadata__ of the safetensors file must map names to strings")


def _check_spans(spans: Sequence[tuple[int, int, str]], data_bytes: int) -> None:
    end = 0
    for begin, next_end, name in sorted(spans):
        if begin != end:
            what = "overlaps another one" if begin < end else "leaves a gap before it"
            raise InvalidError(f"tensor {name[:100]!r} {what}")
        end = next_end
    if end != data_bytes:
        raise InvalidError(f"{data_bytes - end} bytes of the safetensors file belong to no tensor")
