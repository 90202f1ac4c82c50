"""Uploads: weights and data that recipes may use, named by the SHA-256 of their bytes."""

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from sqlalchemy import func, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from server import npz_file, safetensors_file
from server.db import Database, now
from server.db.models import AssetOwnerRow, AssetRow
from server.errors import NotFoundError, QuotaError, StorageFullError, TooLargeError
from server.schemas import Asset
from server.settings import Settings

Kind = Literal["safetensors", "npz"]
_BLOCK_BYTES = 1 << 20
_RESERVED_BYTES = 64 << 20
_INCOMING, _DELETED = ".incoming", ".deleted"
_LEFT_AFTER_S = 24 * 3600.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Assets:
    """Uploads in a folder, and whose they are in the database.

    The same bytes are kept once, however many owners have them; each counts towards the quota of
    each. Nothing of an upload is executed or unpickled, and no name of a client is a path.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._folder = settings.assets_dir
        self._most_bytes = settings.max_asset_bytes
        self._quota_bytes = settings.asset_quota_bytes

    async def store(
        self, chunks: AsyncIterable[bytes], owner: str, kind: Kind, name: str
    ) -> tuple[Asset, bool]:
        """Keep what streams in, once it is found sound; return it and whether it is new.

        Raises TooLargeError, QuotaError, StorageFullError, or InvalidError for a file that is not
        what `kind` says. Nothing is left of what was refused or broke off.
        """
        await run_in_threadpool(_sweep, self._folder)
        with await run_in_threadpool(_Incoming, self._folder, self._most_bytes) as incoming:
            block = bytearray()
            async for chunk in chunks:
                block += chunk
                if len(block) >= _BLOCK_BYTES:
                    await run_in_threadpool(incoming.write, bytes(block))
                    block.clear()
            await run_in_threadpool(incoming.write, bytes(block))
            return await run_in_threadpool(self._keep, incoming, owner, kind, name)

    def page(
        self, owner: str, limit: int, before: tuple[datetime, str] | None = None
    ) -> Sequence[Asset]:
        """Return an owner's uploads, the newest first, that follow the one of this time and id."""
        query = (
            select(AssetRow, AssetOwnerRow)
            .join(AssetOwnerRow, AssetOwnerRow.asset_id == AssetRow.id)
            .where(AssetOwnerRow.owner == owner)
            .order_by(AssetOwnerRow.created_at.desc(), AssetOwnerRow.asset_id.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(
                tuple_(AssetOwnerRow.created_at, AssetOwnerRow.asset_id) < tuple_(*before)
            )
        with self._database.reading() as session:
            return [_shown(row, mine) for row, mine in session.execute(query)]

    def get(self, asset_id: str, owner: str) -> Asset:
        """Return an upload; raises NotFoundError, too, for one that only others have."""
        with self._database.reading() as session:
            mine = _found(session, asset_id, owner)
            return _shown(session.get_one(AssetRow, asset_id), mine)

    def path(self, asset_id: str, owner: str) -> Path:
        """Return the file of an upload; raises NotFoundError where it is not this owner's."""
        with self._database.reading() as session:
            _found(session, asset_id, owner)
        path = self._folder / asset_id
        if not path.is_file():
            raise NotFoundError(f"the file of asset {asset_id!r} is gone: upload it again")
        return path

    def delete(self, asset_id: str, owner: str) -> None:
        """Forget that an owner has an upload, and the file when nobody has it any more."""
        path = self._folder / asset_id
        aside = self._folder / f"{asset_id}.{secrets.token_hex(8)}{_DELETED}"
        is_done = False
        try:
            with self._database.writing() as session:
                row = session.get(AssetRow, asset_id, with_for_update=True)
                session.delete(_found(session, asset_id, owner))
                session.flush()
                if row is not None and not _owners(session, asset_id):
                    session.delete(row)
                    session.flush()
                    if path.exists():
                        path.rename(aside)  # under the row's lock: nobody stores it meanwhile
            is_done = True
        finally:
            if is_done:
                aside.unlink(missing_ok=True)
            elif aside.exists():
                aside.rename(path)

    def _keep(self, incoming: "_Incoming", owner: str, kind: Kind, name: str) -> tuple[Asset, bool]:
        if kind == "npz":
            npz_file.check(incoming.path, self._most_bytes)
        else:
            safetensors_file.check(incoming.path)
        asset_id = incoming.finish()
        try:
            return self._recorded(incoming, AssetRow(id=asset_id, kind=kind), owner, name)
        except IntegrityError:  # the same bytes came twice at the same moment
            return self._recorded(incoming, AssetRow(id=asset_id, kind=kind), owner, name)

    def _recorded(
        self, incoming: "_Incoming", new: AssetRow, owner: str, name: str
    ) -> tuple[Asset, bool]:
        """Enter the upload, and put the file in its place while its row is locked."""
        with self._database.writing() as session:
            row = session.get(AssetRow, new.id, with_for_update=True)
            moment = now(session)
            if row is None:
                row = new
                row.size_bytes, row.created_at = incoming.size_bytes, moment
                session.add(row)
                session.flush()
            mine = session.get(AssetOwnerRow, (row.id, owner))
            is_new = mine is None
            if mine is None:
                self._check_quota(session, owner, incoming.size_bytes)
                mine = AssetOwnerRow(asset_id=row.id, owner=owner, name=name, created_at=moment)
                session.add(mine)
                session.flush()
            incoming.move_to(self._folder / row.id)
            return _shown(row, mine), is_new

    def _check_quota(self, session: Session, owner: str, size_bytes: int) -> None:
        if not self._database.is_sqlite:  # there, whoever writes is alone already
            session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"assets {owner}"))))
        query = (
            select(func.coalesce(func.sum(AssetRow.size_bytes), 0))
            .join(AssetOwnerRow, AssetOwnerRow.asset_id == AssetRow.id)
            .where(AssetOwnerRow.owner == owner)
        )
        used = int(session.scalars(query).one())
        if used + size_bytes > self._quota_bytes:
            raise QuotaError(
                f"{owner!r} has uploads of {used} bytes, and {size_bytes} more would exceed the "
                f"quota of {self._quota_bytes}: delete some first",
                used_bytes=used,
                quota_bytes=self._quota_bytes,
            )


class _Incoming:
    """A file that is being received: under a name of its own until it is whole."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / f"{secrets.token_hex(16)}{_INCOMING}"
        self.size_bytes = 0
        self._most_bytes = most_bytes
        self._sha256 = hashlib.sha256()
        with _no_room():
            self._file = os.fdopen(
                os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            )

    def __enter__(self) -> "_Incoming":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _no_room():
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, block: bytes) -> None:
        """Append a block; refuse it where it is too much for the limit or the disk."""
        self.size_bytes += len(block)
        if self.size_bytes > self._most_bytes:
            raise TooLargeError(
                f"an upload may have at most {self._most_bytes} bytes", max_bytes=self._most_bytes
            )
        if shutil.disk_usage(self.path.parent).free < len(block) + _RESERVED_BYTES:
            raise _full()
        self._sha256.update(block)
        with _no_room():
            self._file.write(block)
            self._file.flush()

    def finish(self) -> str:
        """Bring the file to the disk; return its SHA-256."""
        with _no_room():
            os.fsync(self._file.fileno())
        return self._sha256.hexdigest()

    def move_to(self, path: Path) -> None:
        """Put the file in its place, unless it is there already."""
        if path.exists():
            return
        with _no_room():
            self.path.rename(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _sweep(folder: Path) -> None:
    """Delete what a process that was killed left behind."""
    for path in (*folder.glob(f"*{_INCOMING}"), *folder.glob(f"*{_DELETED}")):
        try:
            if path.stat().st_mtime < time.time() - _LEFT_AFTER_S:
                path.unlink()
        except FileNotFoundError:  # another process was first
            continue


@contextmanager
def _no_room() -> Iterator[None]:
    """Turn the error of a full disk into a StorageFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _full() from error
        raise


def _full() -> StorageFullError:
    return StorageFullError("the service's disk has no room for this upload: tell its operator")


def _found(session: Session, asset_id: str, owner: str) -> AssetOwnerRow:
    mine = session.get(AssetOwnerRow, (asset_id, owner))
    if mine is None:
        raise NotFoundError(f"there is no asset {asset_id!r}")
    return mine


def _owners(session: Session, asset_id: str) -> int:
    query = select(func.count()).where(AssetOwnerRow.asset_id == asset_id)
    return session.scalars(query).one()


def _shown(row: AssetRow, mine: AssetOwnerRow) -> Asset:
    return Asset.model_validate(
        {
            "id": row.id,
            "kind": row.kind,
            "name": mine.name,
            "size_bytes": row.size_bytes,
            "created_at": mine.created_at,
        }
    )
