"""Compiles a graph ahead of time into a package that PyTorch runs without this library."""

import logging
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import ExportedProgram

from tuner.errors import ExportError, brief
from tuner.exporters.agreement import Run
from tuner.exporters.torch_spelling import aten

_KERNELS = ("qlinear_pointwise", "qconv_pointwise", "qconv2d_pointwise")
_CHUNK = 1 << 20
_SUM, _ADD = "sum", "add"
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.alias.default,
)


class KeepInputs(CustomGraphPass):
    """Lets no kernel add in place to a tensor that others see: an input, a constant, a view.

    The compiler turns `x + linear(y)` into a kernel that adds to x itself, and checks only that
    nothing later in the graph reads x: the caller's tensor would be overwritten.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for op in (
            torch.ops.onednn.qlinear_pointwise.binary,
            torch.ops.onednn.qlinear_pointwise.binary_tensor,
            torch.ops.onednn.qconv2d_pointwise.binary,
            torch.ops.onednn.qconv2d_pointwise.binary_tensor,
        ):
            names = [argument.name for argument in op._schema.arguments]
            kind = next(i for i, name in enumerate(names) if name.startswith("binary"))
            for node in graph.find_nodes(op="call_function", target=op):
                if node.args[kind] == _SUM and _is_seen(node.args[6]):
                    node.update_arg(kind, _ADD)

    def uuid(self) -> str:
        """Return what tells this pass from others in the compiler's cache."""
        return "keep-inputs-1"


def _is_seen(node: Any) -> bool:
    return node.op in ("placeholder", "get_attr") or node.target in _VIEWS


def has_compiler() -> bool:
    """Whether the C++ compiler is there that PyTorch compiles with."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def compile_package(program: ExportedProgram, path: Path) -> None:
    """Compile a program into a `.pt2` package.

    Raises ExportError where the compiler fails, or the file cannot be written.
    """
    config = {
        **_config(),
        "aot_inductor.enable_line_tables": False,  # a megabyte that only debuggers read
    }
    try:
        with torch.no_grad(), _quiet():
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=config)
    except Exception as error:  # PyTorch's compiler has no exception of its own
        raise ExportError(
            f"PyTorch cannot compile the model into {path}: {brief(error)}"
        ) from error


def compile_freezing(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph for inputs of these shapes alone, its constants packed into its kernels.

    It must be called without gradients. Raises ExportError where the compiler fails.
    """
    compiled: Callable[..., Any] = torch.compile(module.eval(), dynamic=False)
    try:
        with torch.no_grad(), _quiet(), inductor_config.patch(_config()):
            compiled(*inputs)
    except Exception as error:  # PyTorch's compiler has no exception of its own
        raise ExportError(f"PyTorch cannot compile an op alone: {brief(error)}") from error
    return compiled


def _config() -> dict[str, Any]:
    return {"freezing": True, "post_grad_custom_pre_pass": KeepInputs()}


def load_package(path: Path) -> Run:
    """Return what runs a package on flat inputs."""
    with _quiet():
        package = aoti_load_package(str(path))

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():  # a package reads memory as if it were contiguous
            found = package(*(tensor.contiguous() for tensor in inputs))
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's warnings about its own ways from the user."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def compress_package(path: Path) -> int:
    """Compress a package and drop its sources; return how often they called integer kernels.

    Raises ExportError where it cannot be written.
    """
    smaller = path.with_name(f"{path.name}.smaller")
    try:
        with zipfile.ZipFile(path) as package, zipfile.ZipFile(smaller, "w") as compressed:
            calls = sum(_compress(package, entry, compressed) for entry in package.infolist())
        smaller.replace(path)
    except OSError as error:
        raise ExportError(f"cannot compress {path}: {error}") from error
    return calls


def _compress(package: zipfile.ZipFile, entry: zipfile.ZipInfo, into: zipfile.ZipFile) -> int:
    """Copy a file that is no source; return how often it calls integer kernels, if it is one."""
    if entry.filename.endswith(".cpp"):
        source = package.read(entry).decode()
        return sum(source.count(f"__{name}") for name in _KERNELS)
    renewed = zipfile.ZipInfo(entry.filename)
    renewed.compress_type = zipfile.ZIP_DEFLATED
    renewed.file_size = entry.file_size  # from 2 GB on the header is a longer one
    with package.open(entry) as whole, into.open(renewed, "w") as packed:
        shutil.copyfileobj(whole, packed, _CHUNK)
    return 0
