"""Fetching one file of a job: in parts if need be, checked, and under its name only when whole."""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from server.client.calls import Call
from server.client.errors import DownloadError
from server.schemas import Artifact

_CHUNK = 1 << 20
# a service must not choose where files go on this machine
_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Download:
    """A file on its way. What came so far lies beside the target, in a `.part` file of its hash.

    So a download that was broken off goes on where it stood, and never goes on with the bytes of
    another version.
    """

    def __init__(self, artifact: Artifact, directory: Path) -> None:
        if not _NAME.fullmatch(artifact.name) or not _SHA256.fullmatch(artifact.sha256):
            raise DownloadError(
                f"the service names a file {artifact.name!r} with the hash {artifact.sha256!r}: "
                "that is no file name, or no SHA-256"
            )
        self._artifact = artifact
        self.target = directory / artifact.name
        self._part = directory / f".{artifact.name}.{artifact.sha256[:16]}.part"

    def is_done(self) -> bool:
        """Return whether the target is there and is what the service has."""
        return self.target.is_file() and _sha256(self.target) == self._artifact.sha256

    @property
    def call(self) -> Call[None]:
        """The request of the bytes that are missing."""
        headers = {"Accept-Encoding": "identity"}
        have = self._size()
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": f'"{self._artifact.sha256}"'}
        path = urlsplit(self._artifact.href).path
        return Call("GET", path, lambda response: None, headers=headers)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are there, right or wrong."""
        return self._part.is_file() and self._size() >= self._artifact.size_bytes

    def begin(self, response: httpx.Response) -> None:
        """Take note of where the bytes of an answer belong."""
        self._part.parent.mkdir(parents=True, exist_ok=True)
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            self._part.write_bytes(b"")
            return
        begin = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if begin != str(self._size()):
            raise DownloadError(
                f"the service sent the bytes from {begin!r} on instead of {self._size()}"
            )

    def write(self, chunk: bytes) -> None:
        """Keep bytes that arrived."""
        with self._part.open("ab") as file:
            file.write(chunk)

    def end(self) -> None:
        """Take note of the end of an answer; raises RemoteProtocolError where bytes are missing."""
        if not self.is_whole:
            raise httpx.RemoteProtocolError(f"{self._artifact.name} ended early")

    def finish(self) -> Path:
        """Check the bytes and give them their name; raises DownloadError for what is damaged."""
        found = _sha256(self._part)
        if found != self._artifact.sha256:
            self._part.unlink()
            raise DownloadError(
                f"{self._artifact.name} arrived damaged: its SHA-256 is {found}, and should be "
                f"{self._artifact.sha256}; download it again"
            )
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._part, self.target)
        return self.target

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
