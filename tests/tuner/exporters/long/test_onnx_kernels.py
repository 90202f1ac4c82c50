"""Each row of the table of ONNX Runtime's kernels, and what it leaves out, tried for real."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.onnx_nets import (
    A8,
    W8,
    Branches,
    Exported,
    exported,
    floats,
    only,
    scheme,
)
from tuner import OpConfig, PerChannel, PerGroup, PerToken
from tuner.exporters.onnx_kernels import ONNX_RUNTIME, why_not_in_onnx_runtime

A4 = scheme("uint4", symmetric=False)
KERNELS = {row.kernel for row in ONNX_RUNTIME}


class Call(nn.Module):
    """One functional call, on two tensors made of the input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "parameter":
            self.weight = nn.Parameter(torch.randn(32, 24))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return {  # type: ignore[no-any-return]
            "matmul": lambda: x @ y.transpose(-1, -2),
            "bmm": lambda: torch.bmm(x, y.transpose(-1, -2)),
            "attention": lambda: nn.functional.scaled_dot_product_attention(x, y, x),
            "parameter": lambda: x @ self.weight,
            "add": lambda: x + y,
            "mul": lambda: x * y,
            "cat": lambda: torch.cat((x, y), -1),
            "einsum": lambda: torch.einsum("bid,bjd->bij", x, y),
            "softmax": lambda: torch.softmax(x, -1),
        }[self.kind]()


class Lookup(nn.Module):
    """An embedding of tokens that are made of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[..., 0] > 0).long())


def linear() -> nn.Module:
    return nn.Linear(32, 24)


def conv() -> nn.Module:
    return nn.Conv1d(6, 6, 3)


class Volume(nn.Module):
    def __init__(self, module: nn.Module, dims: int) -> None:
        super().__init__()
        self.module, self.dims = module, dims

    def forward(self, x: Tensor) -> Tensor:
        shape = (6, 4, 8) if self.dims == 2 else (6, 2, 4, 4)
        return self.module(x.reshape(len(x), *shape))


BOTH = OpConfig(inputs=A8)
ENDS = OpConfig(inputs=A8, output=A8)
RUNS: Mapping[str, tuple[nn.Module, str, OpConfig, str]] = {
    "w8a8": (linear(), "", OpConfig(weight=W8, inputs=A8), "MatMulIntegerToFloat"),
    "signed": (linear(), "", OpConfig(weight=W8, inputs=scheme("int8")), "MatMulIntegerToFloat"),
    "w4a4": (
        linear(),
        "",
        OpConfig(weight=scheme("int4", PerChannel(0)), inputs=A4),
        "MatMulIntegerToFloat",
    ),
    "zeros": (
        linear(),
        "",
        OpConfig(weight=scheme("uint8", PerChannel(0), symmetric=False), inputs=A8),
        "MatMulIntegerToFloat",
    ),
    "parameter": (
        Call("parameter"),
        "/matmul:0",
        OpConfig(weight=scheme("int8", PerChannel(-1)), inputs=A8),
        "MatMulIntegerToFloat",
    ),
    "matmul": (Call("matmul"), "/matmul:0", BOTH, "MatMulIntegerToFloat"),
    "bmm": (Call("bmm"), "/bmm:0", BOTH, "MatMulIntegerToFloat"),
    "attention": (
        Call("attention"),
        "/scaled_dot_product_attention:0",
        BOTH,
        "MatMulIntegerToFloat",
    ),
    "conv1": (conv(), "", OpConfig(weight=W8, inputs=A8, output=A8), "QLinearConv"),
    "conv2": (
        Volume(nn.Conv2d(6, 6, 3, groups=3), 2),
        ".module",
        OpConfig(weight=scheme("int4", PerChannel(0)), inputs=A4, output=A8),
        "QLinearConv",
    ),
    "conv3": (
        Volume(nn.Conv3d(6, 6, 2), 3),
        ".module",
        OpConfig(weight=W8, inputs=A8, output=A8),
        "QLinearConv",
    ),
    "weight4": (linear(), "", OpConfig(weight=scheme("int4", PerGroup(16, -1))), "MatMulNBits"),
    "weight8": (linear(), "", OpConfig(weight=W8), "MatMulNBits"),
    "weight_row": (linear(), "", OpConfig(weight=scheme("int4", PerGroup(128, -1))), "MatMulNBits"),
    "weight_parameter": (
        Call("parameter"),
        "/matmul:0",
        OpConfig(weight=scheme("int4", PerGroup(16, 0))),
        "MatMulNBits",
    ),
    "table": (Lookup(), ".table", OpConfig(weight=scheme("int4", PerGroup(16, -1))), "Gather"),
    "add": (Call("add"), "/add:0", ENDS, "QLinearAdd"),
    "mul": (Call("mul"), "/mul:0", ENDS, "QLinearMul"),
    "cat": (Call("cat"), "/cat:0", ENDS, "QLinearConcat"),
}
FLOATS: Mapping[str, tuple[nn.Module, str, OpConfig, str]] = {
    "wide": (linear(), "", OpConfig(weight=W8, inputs=scheme("int16")), "8 bits at most"),
    "fp8": (
        linear(),
        "",
        OpConfig(weight=scheme("e4m3fn"), inputs=scheme("e4m3fn")),
        "8 bits at most",
    ),
    "dynamic": (
        linear(),
        "",
        OpConfig(
            weight=scheme("int8", PerGroup(8, -1)), inputs=scheme("int8", PerToken(), dynamic=True)
        ),
        "static scale",
    ),
    "across": (
        linear(),
        "",
        OpConfig(weight=scheme("int8", PerChannel(1)), inputs=A8),
        "one weight scale for each output channel",
    ),
    "groups": (
        linear(),
        "",
        OpConfig(weight=scheme("int8", PerGroup(16, -1)), inputs=A8),
        "one weight scale for each output channel",
    ),
    "unweighted": (
        linear(),
        "",
        BOTH,
        "needs? a quantized weight|need its weight|quantized weight",
    ),
    "short": (linear(), "", OpConfig(weight=scheme("int4", PerGroup(8, -1))), "groups of 8"),
    "odd": (linear(), "", OpConfig(weight=scheme("int4", PerGroup(24, -1))), "groups of 24"),
    "alone": (conv(), "", OpConfig(weight=W8), "input 0"),
    "transposed": (
        nn.ConvTranspose1d(6, 6, 2),
        "",
        OpConfig(weight=scheme("int8", PerChannel(1)), inputs=A8, output=A8),
        "ConvTranspose1d in float",
    ),
    "einsum": (Call("einsum"), "/einsum:0", BOTH, "einsum in float"),
    "softmax": (Call("softmax"), "/softmax:0", BOTH, "Softmax in float"),
}


def _exported(cases: Mapping[str, tuple[nn.Module, str, OpConfig, str]]) -> Exported:
    torch.manual_seed(0)
    configs = {f"{name}{op}": config for name, (_, op, config, _) in cases.items()}
    branches = {name: module for name, (module, *_) in cases.items()}
    return exported(Branches(**branches), floats(3, 6, 32), only(configs))


@pytest.fixture(scope="module")
def integers() -> Exported:
    return _exported(RUNS)


@pytest.fixture(scope="module")
def left() -> Exported:
    return _exported(FLOATS)


def _why(model: Exported, name: str, config: OpConfig) -> str | None:
    return why_not_in_onnx_runtime(model.quantized._parts.model.ops[name], config)


@pytest.mark.parametrize("name", RUNS)
def test_what_the_table_allows_runs_with_its_kernel(integers: Exported, name: str) -> None:
    _, op, config, kernel = RUNS[name]
    assert _why(integers, f"{name}{op}", config) is None
    ops = integers.behind(name)
    assert kernel in ops
    assert not ops & {"MatMul", "FusedMatMul", "Gemm", "Conv", "FusedConv"}


@pytest.mark.parametrize("name", FLOATS)
def test_what_the_table_refuses_runs_in_float(left: Exported, name: str) -> None:
    _, op, config, why = FLOATS[name]
    found = _why(left, f"{name}{op}", config)
    assert found is not None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found)
    assert not left.behind(name) & (KERNELS - {"Gather"})


def test_every_row_is_tried() -> None:
    assert {kernel for *_, kernel in RUNS.values()} == KERNELS


def test_both_are_exact(integers: Exported, left: Exported) -> None:
    assert max(integers.worst().values()) < 1e-5
    assert max(left.worst().values()) < 1e-5
    assert max(left.worst(optimized=True).values()) < 1 / 100
    assert max(integers.worst(optimized=True).values()) < 1 / 100
