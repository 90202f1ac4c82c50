"""Check an uploaded npz file: a zip of plain arrays, without pickles, bombs and paths."""

import io
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from server.errors import InvalidError

_END = struct.Struct("<4s4H2LH")  # the end-of-central-directory record
_END_MAGIC = b"PK\x05\x06"
_ZIP64_MAGIC = b"PK\x06\x07"
_ZIP64_BYTES = 20
_LOCAL_MAGIC = b"PK\x03\x04"
_LOCAL_BYTES = 30
_MOST_MEMBERS = 1024
_LONGEST_DIRECTORY = 1 << 20
_LONGEST_HEADER = 4096
_ENCRYPTED = 0x1
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,200}\.npy")
_ITEM = rb"'\w+': ?(?:'[^'\\\s]*'|True|False|\([\d, ]*\))"
_HEADER = re.compile(rb"\{%(item)s(?:, ?%(item)s)*,? ?\}" % {b"item": _ITEM})
_DTYPE = re.compile(rb"'descr': ?'([^']*)'")
_PLAIN_DTYPE = re.compile(rb"[<>|=]?(?:b1|[iu][1248]|f[248])")
_KEY = re.compile(rb"'(\w+)':")
_KEYS = [b"descr", b"fortran_order", b"shape"]
_MOST_AXES = 32
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,  # of a member's name
)


def check(path: Path, most_bytes: int) -> None:
    """Raise InvalidError unless this is an npz of numbers with `most_bytes` when unpacked.

    The zip's directory is checked before Python's reader sees it, every member is read once, and
    its checksum and length are compared with what the array's header says. Nothing is unpickled.
    """
    directory_at = _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, directory_at, most_bytes)
            for member in members:
                with archive.open(member) as file:
                    _check_array(file, member)
    except _UNREADABLE as error:
        raise InvalidError(f"not an npz file: {error}") from error


def _check_directory(path: Path) -> int:
    """Return where the zip's directory begins; refuse what would fill the memory when read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begins = file.read(len(_LOCAL_MAGIC))
        file.seek(max(size - _END.size - _ZIP64_BYTES, 0))
        tail = file.read()
    if begins != _LOCAL_MAGIC or size < _END.size:
        raise InvalidError("not an npz file: it does not begin as numpy.savez begins it")
    magic, *disks, count, length, at, comment = _END.unpack(tail[-_END.size :])
    if magic != _END_MAGIC or comment != 0 or disks != [0, 0, count]:
        raise InvalidError("not an npz file, or one that was cut off: it does not end as zips end")
    if tail.startswith(_ZIP64_MAGIC):
        raise InvalidError("the npz file is too large for a plain zip: upload safetensors instead")
    if count > _MOST_MEMBERS or length > _LONGEST_DIRECTORY:
        raise InvalidError(f"the npz file has {count} members: at most {_MOST_MEMBERS} are taken")
    if at + length + _END.size != size:
        raise InvalidError("the npz file has bytes that belong to no member")
    return int(at)


def _check_members(members: Sequence[zipfile.ZipInfo], directory_at: int, most_bytes: int) -> None:
    if not members:
        raise InvalidError("the npz file has no array")
    for member in members:
        _check_member(member)
    if len({member.filename.lower() for member in members}) != len(members):
        raise InvalidError("the npz file has two members of one name")
    unpacked = sum(member.file_size for member in members)
    if unpacked > most_bytes:
        raise InvalidError(f"the npz file unpacks to {unpacked} bytes: at most {most_bytes}")
    end = 0  # members that share bytes unpack to more than their number lets expect
    for member in sorted(members, key=lambda each: each.header_offset):
        if member.header_offset < end:
            raise InvalidError(f"member {member.filename!r} of the npz file overlaps another one")
        end = member.header_offset + _LOCAL_BYTES + len(member.filename) + member.compress_size
    if end > directory_at:
        raise InvalidError("the last member of the npz file overlaps its directory")


def _check_member(member: zipfile.ZipInfo) -> None:
    shown = repr(member.orig_filename[:100])
    if member.orig_filename != member.filename or not _NAME.fullmatch(member.filename):
        raise InvalidError(
            f"member {shown} of the npz file has a name that is not taken: letters, digits, "
            "'_', '-', '.' and blanks, and .npy at the end"
        )
    if member.flag_bits & _ENCRYPTED:
        raise InvalidError(f"member {shown} of the npz file is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidError(f"member {shown} of the npz file is packed in an unknown way")


def _check_array(file: IO[bytes], member: zipfile.ZipInfo) -> None:
    """Read a member to its end; refuse it unless it is one array of numbers of that length."""
    shape, dtype = _read_header(file, member.filename)
    if len(shape) > _MOST_AXES:
        raise InvalidError(f"array {member.filename!r} has {len(shape)} axes")
    rest = 0
    while chunk := file.read(_CHUNK_BYTES):  # at the end the checksum is compared
        rest += len(chunk)
    if rest != prod(shape) * dtype.itemsize:
        raise InvalidError(
            f"array {member.filename!r} of shape {shape} and dtype {dtype} does not have {rest} "
            "bytes"
        )


def _read_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the dtype that an npy file declares."""
    try:
        text = _header_text(file)
        # numpy's reader parses it again, now that there is nothing in it that nests
        plain = io.BytesIO(struct.pack("<H", len(text)) + text)
        shape, _, dtype = npy.read_array_header_1_0(plain, max_header_size=_LONGEST_HEADER)
    except (ValueError, SyntaxError, TypeError, OverflowError, tokenize.TokenError) as error:
        raise InvalidError(f"member {name!r} of the npz file is no plain array: {error}") from error
    return shape, dtype


def _header_text(file: IO[bytes]) -> bytes:
    """Return the text of an npy header; ValueError where it is not as numpy writes it."""
    width = {(1, 0): 2, (2, 0): 4}.get(npy.read_magic(file))
    if width is None:
        raise ValueError("only versions 1 and 2 of the npy format are taken")
    length = int.from_bytes(file.read(width), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes: at most {_LONGEST_HEADER} are taken")
    text = file.read(length).strip()
    # of a key that comes twice numpy takes the last one, which nothing here has looked at
    if not _HEADER.fullmatch(text) or sorted(_KEY.findall(text)) != _KEYS:
        raise ValueError("its header is none of an array without fields")
    dtype = _DTYPE.search(text)
    if dtype is None or not _PLAIN_DTYPE.fullmatch(dtype[1]):
        found = "none" if dtype is None else dtype[1].decode("ascii", "replace")
        raise ValueError(f"its dtype is {found!r}: only bool, int, uint and float are taken")
    return text
