"""Files that are not checked yet: hidden beside their place, and moved there when all is well."""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tuner.errors import ExportError

try:
    import fcntl
except ImportError:  # on Windows: what killed exports leave stays there, and no export waits
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".accutune-export-"
_KEPT = ".kept-"
_DIGITS = 16


class CannotWriteError(ExportError):
    """A file or folder cannot be written; `reason` is what the file system says."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"cannot write {str(path)!r}: {reason}. Choose a path that can be written, with room "
            "left on the disk"
        )
        self.reason = reason


def file_of(path: Path, suffix: str) -> Path:
    """Return the file to write: the path itself if it ends so, else one named model in it."""
    return path if path.suffix == suffix else path / f"model{suffix}"


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Make the folder of a file; what the block cannot write is a CannotWriteError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CannotWriteError(file, error.strerror or str(error)) from error


def written(files: Mapping[str, bytes], folder: Path) -> tuple[Path, ...]:
    """Write files into a folder, and return them; raises CannotWriteError."""
    for name, contents in files.items():
        with writing(folder / name):
            (folder / name).write_bytes(contents)
    return tuple(folder / name for name in files)


def digest(contents: bytes) -> str:
    """Return what tells contents from others: their SHA-256, in hexadecimal digits."""
    return hashlib.sha256(contents).hexdigest()


def data_name(file: Path, data: Path) -> str:
    """Return the name for the data of a file, made of their contents: no older file has it."""
    with data.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    return f"{file.name}.{found[:_DIGITS]}.data"


def _data_of(file: Path) -> list[Path]:
    """Return the data files that a file names, and those that killed exports made for it."""
    made = re.compile(rf"{re.escape(file.name)}\.[0-9a-f]{{{_DIGITS}}}\.data")
    found = list(file.parent.glob(f"{glob.escape(file.name)}*.data"))
    contents = file.read_bytes() if found and file.is_file() else b""
    return [
        data
        for data in found
        if made.fullmatch(data.name) or (data.name.encode() in contents and data.is_file())
    ]


class Stage:
    """Where an artifact is written before it is checked: `path`, in a hidden folder.

    The folder lies in the one where the artifact's files are to be.
    """

    def __init__(self, folder: Path, name: str | None) -> None:
        self._folder = folder
        self.path = folder if name is None else folder / name

    def keep(self, files: Iterable[Path]) -> tuple[Path, ...]:
        """Move files to where they are to be, the first one last; return them there.

        Each replaces at once what was there. What was there comes back where one cannot be moved,
        or Ctrl-C comes between two; a kill between them leaves files of two artifacts beside one
        another, so that the first must name the others by their contents (`data_name`) or hold
        their `digest`. Data files that the first one named before are removed at the end. Raises
        CannotWriteError where a folder is in the way; then nothing is moved.
        """
        home = self._folder.parent
        moves = {path: home / path.name for path in files}
        with _locked(home):
            for place in moves.values():
                if place.is_dir():
                    raise CannotWriteError(place, f"{place.name} is a folder")
            stale = [data for place in moves.values() for data in _data_of(place)]
            _replace(list(reversed(moves.items())), self._folder)
            for data in set(stale) - set(moves.values()):
                with suppress(OSError):
                    data.unlink()
        return tuple(moves.values())


def _replace(moves: list[tuple[Path, Path]], folder: Path) -> None:
    """Move files to their places, all or none; what was there is kept in `folder` meanwhile."""
    kept = {place: folder / f"{_KEPT}{index}" for index, (_, place) in enumerate(moves)}
    with writing(folder / _KEPT):
        for place, copy in kept.items():
            if place.exists():
                _link(place, copy)
    try:
        for path, place in moves:
            with writing(place):
                os.replace(path, place)
    except BaseException:
        for path, place in moves:
            if not path.exists():  # it is at its place
                with suppress(OSError):
                    os.replace(kept[place], place) if kept[place].exists() else place.unlink()
        raise


def _link(file: Path, name: Path) -> None:
    """Give a file a second name; where the file system knows none, copy it."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)


@contextmanager
def staged(path: Path, is_file: bool, names: Iterable[str] = ()) -> Iterator[Stage]:
    """Yield a stage for an artifact that is to be at a path: one file, or files in a folder.

    `names` are those of files in the folder that are known before.

    What was not kept when the block ends is gone, however it ends, and so are folders that were
    made for it; what killed processes left there goes first. Raises CannotWriteError at once where
    nothing can be written there.
    """
    home = path.parent if is_file else path
    # os.path, which raises nothing where a folder cannot be looked into
    made = [folder for folder in (home, *home.parents) if not os.path.exists(folder)]
    try:
        _check_kind(path, is_file)
        for name in names:
            if os.path.isdir(home / name):
                raise CannotWriteError(home / name, f"{name} is a folder")
        with writing(home / _PREFIX):
            folder, held = _hidden(home)
        try:
            if is_file:
                with writing(folder / path.name):
                    _check_name(folder / path.name)
            yield Stage(folder, path.name if is_file else None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if held is not None:
                os.close(held)
    except CannotWriteError as error:  # the user knows no hidden folders
        raise CannotWriteError(path, error.reason) from error
    finally:
        for parent in made:
            with suppress(OSError):  # where it is not empty, it stays
                parent.rmdir()


def _check_kind(path: Path, is_file: bool) -> None:
    if is_file and os.path.isdir(path):
        raise CannotWriteError(path, "it is a folder, where a file is to be")
    if not is_file and os.path.isfile(path):
        raise CannotWriteError(path, "it is a file, where a folder is to be")


def _check_name(file: Path) -> None:
    """Raise OSError where a folder takes no file of that name: one that is too long."""
    file.touch()
    file.unlink()


def _hidden(home: Path) -> tuple[Path, int | None]:
    """Return a new hidden folder in a folder, and what holds its lock as long as we live."""
    if fcntl is None:
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home)), None
    with _locked(home):
        _sweep(home)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
        held = os.open(folder, os.O_RDONLY)
        _try_lock(held)
    return folder, held


def _sweep(home: Path) -> None:
    """Remove what killed processes left; those that live hold locks."""
    for folder in home.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _try_lock(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock a folder; return False where another process did, or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder, where the file system has locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
