"""Networks for tests of ONNX exports, and what comes of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from tuner import (
    OpConfig,
    PerChannel,
    PerTensor,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.example import Example
from tuner.exporters.base import ExportRequest
from tuner.exporters.onnx_file import OnnxModel, to_onnx
from tuner.exporters.onnx_graph import QdqGraph, qdq_graph
from tuner.exporters.onnx_layers import layer_agreement
from tuner.exporters.onnx_runtime import OnnxRuntimeSession, optimized_graph
from tuner.exporters.onnx_saturation import make_exact
from tuner.exporters.report import LayerAgreement
from tuner.exporters.targets import exporter
from tuner.exporters.tracing import Traced, trace
from tuner.granularity import Granularity
from tuner.quantized_model import QuantizedModel


def scheme(fmt: str, reach: Granularity | None = None, **options: Any) -> TensorScheme:
    return TensorScheme(format=fmt, granularity=reach or PerTensor(), **options)


# what integer kernels of this CPU take at full speed
W8 = scheme("int8", PerChannel(0), reduce_range=exporter("onnxruntime").saturates)
A8 = scheme("uint8", symmetric=False)
STATIC = OpConfig(weight=W8, inputs=A8)


def only(configs: Mapping[str, OpConfig]) -> SearchSpace:
    """Return a space that quantizes the ops of these names (or globs), and nothing else."""
    rest = Rule(names=["*"], options=[OpConfig.float()])
    named = [Rule(names=[name], options=[config]) for name, config in configs.items()]
    return SearchSpace(preset="int8", rules=[rest, *named])


def int8(model: nn.Module) -> SearchSpace:
    """Return a space of 8 bits for all modules, as integer kernels of this CPU take them."""
    known = {"Embedding": OpConfig(weight=W8), "Linear": STATIC, "Conv1d": STATIC, "Conv2d": STATIC}
    types = {type(module).__name__ for module in model.modules()}
    rules = [Rule(op_types=[t], options=[config]) for t, config in known.items() if t in types]
    return SearchSpace(preset="int8", rules=rules)


class Branches(nn.Module):
    """Modules that all take the same input; each gives an output of its own."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.names = list(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self.get_submodule(name)(x) for name in self.names}


class Attention(nn.Module):
    """A head of attention under a causal mask, or under one that it is given."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.is_causal = is_causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, 2, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        given = None if mask is None else mask[:, None]
        y = F.scaled_dot_product_attention(q, k, v, given, is_causal=self.is_causal)
        return self.out(y.transpose(1, 2).reshape(n, t, 16))


@dataclass(frozen=True, eq=False)
class Exported:
    """A quantized model, its graph, and its ONNX file in memory."""

    quantized: QuantizedModel
    traced: Traced
    graph: QdqGraph
    model: OnnxModel

    @cached_property
    def contents(self) -> bytes:
        return self.model.to_bytes()

    @cached_property
    def proto(self) -> onnx.GraphProto:
        return onnx.load_from_string(self.contents).graph

    @cached_property
    def fast(self) -> OnnxModel:
        """The model as integer kernels of this CPU are exact with."""
        found = OnnxModel(ir.from_proto(ir.to_proto(self.model.model)))
        if exporter("onnxruntime").saturates:
            make_exact(found, self.graph)
        return found

    @property
    def opset(self) -> int:
        return int(onnx.load_from_string(self.contents).opset_import[0].version)

    def types(self) -> dict[str, str]:
        """Return the types of the constants, by name."""
        return {i.name: TensorProto.DataType.Name(i.data_type) for i in self.proto.initializer}

    def run(self, inputs: Sequence[Tensor] | None = None, optimized: bool = False) -> list[Tensor]:
        contents = self.fast.to_bytes() if optimized else self.contents
        session = OnnxRuntimeSession(contents, optimized=optimized)
        return session.run(self.traced.example.tensors if inputs is None else inputs)

    def worst(self, optimized: bool = False) -> dict[str, float]:
        """Return how far each output is from the simulation, in parts of its largest value."""
        expected = self.traced.simulate(*self.traced.example.tensors)
        found = self.run(optimized=optimized)
        names = self.traced.outputs
        return {
            name: ((f.double() - e.double()).abs().max() / e.abs().max().clamp(min=1e-6)).item()
            for name, e, f in zip(names, expected, found, strict=True)
        }

    def layers(self) -> tuple[LayerAgreement, ...]:
        return layer_agreement(
            self.fast,
            self.graph.pairs,
            self.traced,
            lambda model: model.load(OnnxRuntimeSession).run,
        )

    @cached_property
    def optimized(self) -> onnx.GraphProto:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(self.fast.to_bytes())
            return optimized_graph(path)

    def kernels(self) -> Counter[str]:
        """Return how often each op occurs in what ONNX Runtime makes of it."""
        return Counter(node.op_type for node in self.optimized.node)

    def behind(self, output: str) -> set[str]:
        """Return the ops of the optimized graph that an output comes from."""
        makers = {name: node for node in self.optimized.node for name in node.output}
        todo, found = [output], set()
        while todo:
            node = makers.get(todo.pop())
            if node is not None:
                found.add(node.op_type)
                todo += list(node.input)
        return found


def quantized(model: nn.Module, batch: Any, space: Any = "int8") -> QuantizedModel:
    return quantization.fit(model.eval(), [batch], config=TuningConfig(space=space))


def exported(
    model: nn.Module,
    batch: Any,
    space: Any = "int8",
    clips_values: bool = False,
    axes: Any = None,
    quick: bool = False,
) -> Exported:
    found = quantized(model, batch, space)
    traced = trace(found._parts.model, Example.of_batch(found.model, batch), axes)
    graph = qdq_graph(traced, clips_values, quick)
    model_ = to_onnx(graph.module, traced)
    onnx.checker.check_model(model_.to_bytes(), full_check=True)
    return Exported(found, traced, graph, model_)


def request(
    model: nn.Module, batch: Any, path: Path, space: Any = "int8", **options: Any
) -> ExportRequest:
    found = quantized(model, batch, space)
    parts = found._parts
    traced = trace(parts.model, Example.of_batch(found.model, batch))
    return ExportRequest(traced, parts.plan, dict(parts.model.ops), path, **options)


def tokens(n: int = 4, length: int = 6, size: int = 50) -> Tensor:
    return torch.randint(0, size, (n, length), generator=torch.Generator().manual_seed(1))


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))
