"""Builds the C sources with the machine's own compiler, once, into the user's cache folder."""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tuner.saved_files import cache_folder

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = ("snap.c", "statistics.c")
_HEADER = "native.h"
# without -fno-… rintf is a call; contraction to fma would change results
_FLAGS = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
# tried in this order: a compiler may lack OpenMP, or know no -march=native
_VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
_TIMEOUT_S = 120


@cache
def library() -> ctypes.CDLL | None:
    """Return the built library, None where there is no compiler or ACCUTUNE_NATIVE is 0.

    It is kept in $XDG_CACHE_HOME/accutune (or ~/.cache/accutune) under a name that changes with
    the source, the compiler and the processor.
    """
    if os.environ.get("ACCUTUNE_NATIVE") == "0":
        _log.debug("native kernels are switched off by ACCUTUNE_NATIVE=0")
        return None
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        _log.debug("there is no C compiler: fake-quantization takes the slower path in torch")
        return None
    for variant in _VARIANTS:
        loaded = _built(compiler, (*_FLAGS, *variant))
        if loaded is not None:
            return loaded
    _log.debug("%s cannot build the native kernels: the slower path in torch is taken", compiler)
    return None


def _built(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    texts = (_FOLDER.joinpath(name).read_text("utf-8") for name in (_HEADER, *_SOURCES))
    identity = "\0".join((*texts, compiler, *flags, processor()))
    name = hashlib.sha256(identity.encode()).hexdigest()[:24] + ".so"
    target = _folder() / name
    try:
        if not target.exists():
            _compile(compiler, flags, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("%s %s: %s", compiler, " ".join(flags), error)
        return None


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile beside the target, then move: another process may do the same at the same time.

    The link step leaves OpenMP's symbols open: they are those of the runtime that torch has loaded,
    so both share its threads.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled = [Path(folder, f"{name}.o") for name in _SOURCES]
        for name, target_object in zip(_SOURCES, compiled, strict=True):
            _run(compiler, *flags, "-c", str(_FOLDER / name), "-o", str(target_object))
        linked = Path(folder, "native.so")
        open_symbols = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
        _run(compiler, "-shared", *open_symbols, *map(str, compiled), "-o", str(linked), "-lm")
        os.replace(linked, target)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip()[-500:])


def _folder() -> Path:
    """Return the cache folder, or one for this process alone where it cannot be written."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError as error:
        _log.debug("%s cannot be used as a cache: %s", folder, error)
    return _temporary_folder()


@cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="accutune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def processor() -> str:
    """Describe the processor: code for -march=native does not run on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("flags", "Features", "model name")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kinds)))
