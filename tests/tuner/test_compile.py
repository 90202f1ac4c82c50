"""What torch.compile and torch.export make of a quantizer: one graph, the same bits."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tuner.granularity import PerChannel, PerGroup, PerToken
from tuner.qparams import compute_qparams, fake_quantize
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme

SCHEMES = {
    "int8": TensorScheme(format="int8"),
    "uint8 affine": TensorScheme(format="uint8", symmetric=False),
    "int4 per channel": TensorScheme(format="int4", granularity=PerChannel(0)),
    "int4 per group": TensorScheme(format="int4", granularity=PerGroup(32)),
    "int8 per token": TensorScheme(format="int8", granularity=PerToken()),
    "int8 dynamic": TensorScheme(format="int8", dynamic=True),
    "e4m3fn": TensorScheme(format="e4m3fn"),
    "e5m2 per channel": TensorScheme(format="e5m2", granularity=PerChannel(1)),
    "e4m3fn_overflow": TensorScheme(format="e4m3fn_overflow"),
    "e3m2_nosub": TensorScheme(format="e3m2_nosub"),
    "bf16": TensorScheme(format="bf16"),
    "mxfp4": TensorScheme(format="mxfp4"),
    "mxint8": TensorScheme(format="mxint8"),
    "nvfp4": TensorScheme(format="nvfp4"),
    "nf4": TensorScheme(format="nf4"),
    "abfp4": TensorScheme(format="abfp4"),
}
X = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantizer(scheme: TensorScheme) -> Quantizer:
    return Quantizer(scheme, None if scheme.is_dynamic else compute_qparams(X, scheme))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in dynamo
@pytest.mark.parametrize("name", SCHEMES)
class TestEveryScheme:
    def test_compiles_as_one_graph(self, name: str) -> None:
        scheme = SCHEMES[name]
        calls: dict[str, Callable[[Tensor], Tensor]] = {
            "a quantizer": quantizer(scheme),
            "parameters": lambda x: fake_quantize(x, scheme, parameters),
            "its own values": lambda x: fake_quantize(x, scheme),
        }
        parameters = compute_qparams(X, scheme)
        for what, call in calls.items():
            compiled = torch.compile(lambda x, call=call: call(x), fullgraph=True, backend="eager")
            assert torch.equal(compiled(X), call(X)), what

    def test_gradient_compiles(self, name: str) -> None:
        scheme = SCHEMES[name]
        gradients = []
        call = quantizer(scheme)
        for run in (torch.compile(lambda x: call(x), fullgraph=True, backend="aot_eager"), call):
            x = X.clone().requires_grad_()
            (run(x) * X).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)

    def test_exports(self, name: str) -> None:
        class Model(nn.Module):
            def __init__(self, call: Quantizer) -> None:
                super().__init__()
                self.call = call

            def forward(self, x: Tensor) -> Tensor:
                return self.call(x)

        model = Model(quantizer(SCHEMES[name]))
        exported = torch.export.export(model, (X,), strict=False)
        assert torch.equal(exported.module()(X), model(X))
