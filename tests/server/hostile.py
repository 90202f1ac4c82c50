"""Files that an upload must be refused for, and sound ones of the same shape."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

Maker = Callable[[], bytes]


class _Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('an upload was unpickled')",))


def sound_npz(compress: bool = False, **arrays: Any) -> bytes:
    """Return what numpy writes."""
    file = io.BytesIO()
    chosen = arrays or {"x": np.arange(12.0).reshape(3, 4), "y": np.array([1, 2, 3])}
    (np.savez_compressed if compress else np.savez)(file, **chosen)
    return file.getvalue()


def sound_safetensors() -> bytes:
    """Return what the safetensors library writes."""
    return save({"w": np.ones((2, 3), np.float32), "b": np.zeros(5, np.int8)}, {"made": "here"})


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Return an npy file with this header."""
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + data


def zipped(
    members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    """Return a zip of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = comment
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return file.getvalue()


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    """Return a tensor's part of the header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


_PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


def _member(header: str, data: bytes = b"\0" * 8, **how: Any) -> Maker:
    return lambda: zipped({"x.npy": npy(header, data, **how)})


def _named(*names: str) -> Maker:
    return lambda: zipped(dict.fromkeys(names, npy(_PLAIN, b"\0" * 8)))


def _pickled() -> bytes:
    return zipped(
        {
            "x.npy": npy(
                "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(_Bomb())
            )
        }
    )


def _objects() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.array([{}, []], dtype=object), allow_pickle=True)
    return file.getvalue()


def _bomb() -> bytes:
    return sound_npz(compress=True, x=np.zeros(1 << 22))


def _lies_about_size() -> bytes:
    data = bytearray(zipped({"x.npy": npy(_PLAIN, b"\0" * 8)}, zipfile.ZIP_DEFLATED))
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 4)
    return bytes(data)


def _overlapping() -> bytes:
    """Return a zip whose two directory entries name the same bytes."""
    data = zipped({"x.npy": npy(_PLAIN, b"\0" * 8)})
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    body, first = data[:at], data[at:end]
    second = first.replace(b"x.npy", b"y.npy")
    size = len(first) + len(second)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, size, at, 0)
    return body + first + second + tail


def _damaged() -> bytes:
    data = bytearray(zipped({"x.npy": npy(_PLAIN, b"\0" * 8)}))
    data[data.index(b"PK\x01\x02") - 1] ^= 1
    return bytes(data)


def _misspelled(record: bytes, flags_at: int) -> bytes:
    """Return a zip where a record says that its name is UTF-8, and it is not."""
    data = bytearray(zipped({"x.npy": npy(_PLAIN, b"\0" * 8)}))
    at = data.index(record)
    data[at + flags_at + 1] |= 0x8
    data[data.index(b"x.npy", at)] = 0xFF
    return bytes(data)


def _hidden_pickle() -> bytes:
    """Return an npz whose header has a key twice: a reader that takes the last one unpickles."""
    text = pickle.dumps(_Bomb())
    text += b"\0" * (-len(text) % 8)
    keys = f"'descr': '<f8', 'descr': '|O', 'fortran_order': False, 'shape': ({len(text) // 8},), "
    return zipped({"x.npy": npy("{" + keys + "}", text)})


def _encrypted() -> bytes:
    data = bytearray(sound_npz())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def _huge_directory() -> bytes:
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65000, 65000, 1 << 21, 4, 0)
    return b"PK\x03\x04" + b"\0" * (1 << 21) + tail


def _zip64() -> bytes:
    data = sound_npz()
    return data[:-22] + b"PK\x06\x07" + b"\0" * 16 + data[-22:]


NPZ: dict[str, Maker] = {
    "empty": lambda: b"",
    "text": lambda: b"hello " * 20,
    "a pickle": lambda: pickle.dumps(_Bomb()),
    "one npy": lambda: npy(_PLAIN, b"\0" * 8),
    "a safetensors file": sound_safetensors,
    "a pickled member": _pickled,
    "an object array": _objects,
    "a pickle behind a key that comes twice": _hidden_pickle,
    "a name of a member that is no UTF-8": lambda: _misspelled(b"PK\x03\x04", 6),
    "a name in the directory that is no UTF-8": lambda: _misspelled(b"PK\x01\x02", 8),
    "a zip bomb": _bomb,
    "a lie about the size": _lies_about_size,
    "overlapping members": _overlapping,
    "a wrong checksum": _damaged,
    "encrypted": _encrypted,
    "a huge directory": _huge_directory,
    "zip64": _zip64,
    "cut off": lambda: sound_npz()[:-1],
    "cut in half": lambda: sound_npz()[:300],
    "something before": lambda: b"#!/bin/sh\n" + sound_npz(),
    "something after": lambda: sound_npz() + b"more",
    "a comment": lambda: zipped({"x.npy": npy(_PLAIN, b"\0" * 8)}, comment=b"more"),
    "no member": lambda: zipped({}),
    "packed by bzip2": lambda: zipped({"x.npy": npy(_PLAIN, b"\0" * 8)}, zipfile.ZIP_BZIP2),
    "too many members": _named(*(f"x{number}.npy" for number in range(1025))),
    "a path": _named("../x.npy"),
    "a path inside": _named("a/x.npy"),
    "an absolute path": _named("/etc/x.npy"),
    "a path of Windows": _named("..\\x.npy"),
    "a drive": _named("C:x.npy"),
    "a folder": _named("x.npy/"),
    "another name": _named("x.py"),
    "a hidden name": _named(".npy"),
    "a null in the name": lambda: _named("x.npyQ.npy")().replace(b"Q", b"\0"),
    "a long name": _named("x" * 300 + ".npy"),
    "two of one name": _named("x.npy", "X.npy"),
    "fields": _member("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }"),
    "text inside": _member("{'descr': '<U2', 'fortran_order': False, 'shape': (1,), }"),
    "raw bytes inside": _member("{'descr': '|V8', 'fortran_order': False, 'shape': (1,), }"),
    "complex": _member("{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }"),
    "a long dtype": _member("{'descr': '<f9999', 'fortran_order': False, 'shape': (1,), }"),
    "too little data": _member(_PLAIN, b"\0" * 7),
    "too much data": _member(_PLAIN, b"\0" * 9),
    "a negative axis": _member("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }"),
    "a huge axis": _member(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 400 + ",), }"
    ),
    "too many axes": _member(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 65 + "), }", b"\0" * 4
    ),
    "a number for a shape": _member("{'descr': '<f4', 'fortran_order': False, 'shape': (2), }"),
    "a hole in the shape": _member("{'descr': '<f4', 'fortran_order': False, 'shape': (1,,2), }"),
    "a key more": _member("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': True}"),
    "a key less": _member("{'descr': '<f4', 'shape': (2,), }"),
    "nested": _member("(" * 2000 + "2" + ")" * 2000),
    "an expression": _member("{'descr': '<f4', 'fortran_order': False, 'shape': (2**9,), }"),
    "a call": _member("{'descr': exit(), 'fortran_order': False, 'shape': (2,), }"),
    "a long header": _member(_PLAIN + " " * 5000),
    "a longer header": _member(_PLAIN + " " * 70_000, version=b"\x02\x00"),
    "version 3": _member(_PLAIN, version=b"\x03\x00"),
    "no header": lambda: zipped({"x.npy": b"\x93NUMPY\x01\x00\xff\xff"}),
    "not an npy": lambda: zipped({"x.npy": b"hello"}),
}

SAFETENSORS: dict[str, Maker] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"\1" * 7,
    "text": lambda: b"hello " * 20,
    "a pickle": lambda: pickle.dumps(_Bomb()),
    "an npz": sound_npz,
    "a header longer than the file": lambda: safetensors({}, length=1000),
    "an endless header": lambda: safetensors({}, length=(1 << 64) - 1),
    "a very long header": lambda: safetensors(b" " * (9 << 20)),
    "cut off": lambda: sound_safetensors()[:-1],
    "cut in the header": lambda: sound_safetensors()[:40],
    "something after": lambda: sound_safetensors() + b"\0",
    "no JSON": lambda: safetensors(b"{"),
    "no UTF-8": lambda: safetensors(b'{"\xff": 1}'),
    "deep JSON": lambda: safetensors(b"[" * 200_000),
    "a long number": lambda: safetensors(b'{"w": ' + b"9" * 5000 + b"}"),
    "no object": lambda: safetensors([]),
    "no tensor": lambda: safetensors({}),
    "a name twice": lambda: safetensors(
        b'{"w":%(one)s,"w":%(one)s}' % {b"one": json.dumps(entry(0, 4)).encode()}, b"\0" * 4
    ),
    "an entry that is none": lambda: safetensors({"w": 1}),
    "a key more": lambda: safetensors({"w": entry(0, 4) | {"file": "/etc/passwd"}}, b"\0" * 4),
    "a key less": lambda: safetensors({"w": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "overlapping": lambda: safetensors(
        {"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, b"\0" * 12
    ),
    "the same bytes": lambda: safetensors({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4),
    "a gap": lambda: safetensors({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
    "a gap at the start": lambda: safetensors({"a": entry(4, 8)}, b"\0" * 8),
    "bytes of no tensor": lambda: safetensors({"a": entry(0, 4)}, b"\0" * 8),
    "beyond the end": lambda: safetensors({"a": entry(0, 4)}, b"\0" * 3),
    "backwards": lambda: safetensors({"a": entry(4, 0)}, b"\0" * 4),
    "before the start": lambda: safetensors({"a": entry(-4, 0)}, b"\0" * 4),
    "three offsets": lambda: safetensors(
        {"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, b"\0" * 4
    ),
    "an offset that is no integer": lambda: safetensors({"a": entry(0, 4.0)}, b"\0" * 4),  # type: ignore[arg-type]
    "another size": lambda: safetensors({"a": entry(0, 4, (2,))}, b"\0" * 4),
    "a negative axis": lambda: safetensors({"a": entry(0, 4, (-1, -1))}, b"\0" * 4),
    "true for an axis": lambda: safetensors({"a": entry(0, 4, (True,))}, b"\0" * 4),
    "too many axes": lambda: safetensors({"a": entry(0, 4, (1,) * 33)}, b"\0" * 4),
    "a shape that wraps around": lambda: safetensors({"a": entry(0, 0, (1 << 32, 1 << 32))}, b""),
    "an unknown dtype": lambda: safetensors({"a": entry(0, 4, dtype="F31")}, b"\0" * 4),
    "a dtype that is no text": lambda: safetensors({"a": entry(0, 4, dtype=["F32"])}, b"\0" * 4),
    "metadata of numbers": lambda: safetensors(
        {"a": entry(0, 4), "__metadata__": {"x": 1}}, b"\0" * 4
    ),
    "metadata that is a list": lambda: safetensors(
        {"a": entry(0, 4), "__metadata__": []}, b"\0" * 4
    ),
}
