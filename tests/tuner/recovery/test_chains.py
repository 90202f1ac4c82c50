"""Chains that are found on recorded graphs, and those that must not be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.recovery.chain_nets import Net, chains_of, names
from tuner.recovery.chains import Chain

IMAGE, ROWS, TOKENS = (2, 3, 8, 8), (4, 6), (2, 5, 6)
Case = tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, ...]]]


def linears(run: Callable[[Any, Tensor], Any], **others: nn.Module) -> nn.Module:
    """Return a network of three linear layers a, b, c of width 6, and others."""
    return Net(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6), **others)


def convs(run: Callable[[Any, Tensor], Any], **others: nn.Module) -> nn.Module:
    """Return a network of two convolutions a: 3 → 4, b: 4 → 4, and others."""
    return Net(run, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3), **others)


def through(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return linears(lambda net, x: net.b(function(net.a(x))))


def through_image(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return convs(lambda net, x: net.b(function(net.a(x))))


FOUND: dict[str, Case] = {
    "nothing between": (lambda: through(lambda x: x), ROWS, [("a", "b")]),
    "functional relu": (lambda: through(F.relu), ROWS, [("a", "b")]),
    "relu in place": (lambda: through(lambda x: x.relu_()), ROWS, [("a", "b")]),
    "leaky relu": (lambda: through(F.leaky_relu), ROWS, [("a", "b")]),
    "prelu": (
        lambda: linears(lambda net, x: net.b(net.act(net.a(x))), act=nn.PReLU(6)),
        ROWS,
        [("a", "b")],
    ),
    "dropout": (lambda: through(lambda x: F.dropout(x, training=False)), ROWS, [("a", "b")]),
    "max pooling": (lambda: through_image(lambda x: F.max_pool2d(x, 2)), IMAGE, [("a", "b")]),
    "average pooling": (lambda: through_image(lambda x: F.avg_pool2d(x, 2)), IMAGE, [("a", "b")]),
    "interpolation": (
        lambda: through_image(lambda x: F.interpolate(x, scale_factor=2.0)),
        IMAGE,
        [("a", "b")],
    ),
    "tokens": (lambda: through(F.relu), TOKENS, [("a", "b")]),
    "a row of chains": (
        lambda: linears(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x)))))),
        ROWS,
        [("a", "b"), ("b", "c")],
    ),
    "two consumers": (
        lambda: linears(lambda net, x: (lambda y: net.b(y) + net.c(y))(F.relu(net.a(x)))),
        ROWS,
        [("a", "b", "c")],
    ),
    "a producer called twice": (
        lambda: linears(lambda net, x: net.b(F.relu(net.a(x))) + net.c(F.relu(net.a(-x)))),
        ROWS,
        [("a", "b", "c")],
    ),
    "a consumer called twice": (
        lambda: linears(lambda net, x: net.b(F.relu(net.a(x))) + net.b(net.a(-x))),
        ROWS,
        [("a", "b")],
    ),
    "layer norm": (
        lambda: linears(lambda net, x: net.b(net.norm(x)), norm=nn.LayerNorm(6)),
        TOKENS,
        [("norm", "b")],
    ),
    "rms norm": (
        lambda: linears(lambda net, x: net.b(net.norm(x)), norm=nn.RMSNorm(6)),
        TOKENS,
        [("norm", "b")],
    ),
    "group norm": (
        lambda: convs(lambda net, x: net.b(net.norm(net.a(x)).relu()), norm=nn.GroupNorm(2, 4)),
        IMAGE,
        [("norm", "b")],
    ),
    "batch norm, folded": (
        lambda: convs(lambda net, x: net.b(net.norm(net.a(x)).relu()), norm=nn.BatchNorm2d(4)),
        IMAGE,
        [("a", "b")],
    ),
    "batch norm of a model's input": (
        lambda: convs(lambda net, x: net.a(net.norm(x)), norm=nn.BatchNorm2d(3)),
        IMAGE,
        [("norm", "a")],
    ),
    "global pooling": (
        lambda: convs(lambda net, x: net.head(net.a(x).relu().mean((2, 3))), head=nn.Linear(4, 2)),
        IMAGE,
        [("a", "head")],
    ),
    "a mean of all tokens": (
        lambda: linears(lambda net, x: net.b(net.a(x).mean(1))),
        TOKENS,
        [("a", "b")],
    ),
    "a flattened convolution": (
        lambda: convs(lambda net, x: net.head(net.a(x).flatten(1)), head=nn.Linear(144, 2)),
        IMAGE,
        [("a", "head")],
    ),
    "depthwise": (
        lambda: Net(
            lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(4, 4, 3, groups=4),
            c=nn.Conv2d(4, 2, 1),
        ),
        IMAGE,
        [("a", "b"), ("b", "c")],
    ),
    "transposed": (
        lambda: Net(
            lambda net, x: net.b(F.relu(net.a(x))),
            a=nn.ConvTranspose2d(3, 4, 2),
            b=nn.ConvTranspose2d(4, 2, 2, groups=2),
        ),
        IMAGE,
        [("a", "b")],
    ),
    "relu6": (
        lambda: convs(lambda net, x: net.b(net.act(net.a(x))), act=nn.ReLU6()),
        IMAGE,
        [("a", "b")],
    ),
}


def _attention(net: Any, x: Tensor) -> Tensor:
    y = net.norm(x)
    return net.attention(y, y, y)[0]  # type: ignore[no-any-return]


MISSING: dict[str, Case] = {
    "the model's output": (lambda: linears(lambda net, x: net.a(x)), ROWS, []),
    "an output beside the consumer": (
        lambda: linears(lambda net, x: (lambda y: {"y": [y], "z": net.b(y)})(F.relu(net.a(x)))),
        ROWS,
        [],
    ),
    "a residual": (
        lambda: linears(lambda net, x: (lambda y: net.b(y) + y)(net.a(x))),
        ROWS,
        [],
    ),
    "gelu": (lambda: through(F.gelu), ROWS, []),
    "a bias added": (lambda: through(lambda x: x + 1), ROWS, []),
    "a product": (lambda: through(lambda x: x * 2), ROWS, []),
    "functional relu6": (lambda: through_image(F.relu6), IMAGE, []),
    "hardtanh with a negative end": (
        lambda: convs(lambda net, x: net.b(net.act(net.a(x))), act=nn.Hardtanh(-1, 1)),
        IMAGE,
        [],
    ),
    "relu6 for two layers": (
        lambda: linears(lambda net, x: net.c(net.act(net.b(net.act(net.a(x))))), act=nn.ReLU6()),
        ROWS,
        [],
    ),
    "relu6 of something else too": (
        lambda: linears(lambda net, x: net.b(net.act(net.a(x))) + net.act(x), act=nn.ReLU6()),
        ROWS,
        [],
    ),
    "relu6 after a reshape": (
        lambda: convs(
            lambda net, x: net.head(net.act(net.a(x).flatten(1))),
            act=nn.ReLU6(),
            head=nn.Linear(144, 2),
        ),
        IMAGE,
        [],
    ),
    "relu6 after a norm of any axis": (
        lambda: convs(
            lambda net, x: net.b(net.act(net.norm(net.a(x)))),
            act=nn.ReLU6(),
            norm=nn.GroupNorm(2, 4),
        ),
        IMAGE,
        [],
    ),
    "permuted": (
        lambda: convs(lambda net, x: net.head(net.a(x).permute(0, 2, 3, 1)), head=nn.Linear(4, 2)),
        IMAGE,
        [],
    ),
    "transposed axes": (lambda: through(lambda x: x.transpose(0, 1)), (6, 6), []),
    "a slice": (lambda: through(lambda x: x[:, :6]), ROWS, []),
    "a mean of all channels": (
        lambda: linears(lambda net, x: net.head(net.a(x).mean(-1)), head=nn.Linear(5, 2)),
        TOKENS,
        [],
    ),
    "layer norm without weights": (
        lambda: linears(
            lambda net, x: net.b(net.norm(x)), norm=nn.LayerNorm(6, elementwise_affine=False)
        ),
        TOKENS,
        [],
    ),
    "layer norm over two axes": (
        lambda: linears(lambda net, x: net.b(net.norm(x)), norm=nn.LayerNorm((5, 6))),
        TOKENS,
        [],
    ),
    "layer norm over two axes, flattened": (
        lambda: linears(
            lambda net, x: net.head(net.norm(x).flatten(1)),
            norm=nn.LayerNorm((5, 6)),
            head=nn.Linear(30, 2),
        ),
        TOKENS,
        [],
    ),
    "the parts of attention": (
        lambda: Net(
            _attention,
            norm=nn.LayerNorm(6),
            attention=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
        TOKENS,
        [],
    ),
    "a recurrence": (
        lambda: linears(lambda net, x: net.a(F.relu(net.a(x)))),
        ROWS,
        [],
    ),
    "a consumer that takes another tensor too": (
        lambda: linears(lambda net, x: net.b(F.relu(net.a(x))) + net.b(x)),
        ROWS,
        [],
    ),
    "a weight used elsewhere": (
        lambda: linears(lambda net, x: net.b(net.a(x)) + F.linear(x, net.b.weight)),
        ROWS,
        [],
    ),
}


@pytest.mark.parametrize("name", [*FOUND, *MISSING])
def test_chains(name: str) -> None:
    make, shape, expected = (FOUND | MISSING)[name]
    torch.manual_seed(0)
    _, chains = chains_of(make(), torch.randn(shape))
    assert names(chains) == expected


def test_channels_and_caps_of_a_chain() -> None:
    make, shape, _ = FOUND["relu6"]
    assert chains_of(make(), torch.randn(shape))[1] == [Chain("a", ("b",), 4, ("act",))]
    make, shape, _ = FOUND["a flattened convolution"]
    assert chains_of(make(), torch.randn(shape))[1] == [Chain("a", ("head",), 4)]


def test_a_batch_norm_that_is_not_folded_makes_the_chain() -> None:
    make, shape, _ = FOUND["batch norm, folded"]
    _, chains = chains_of(make(), torch.randn(shape), folds=False)
    assert names(chains) == [("norm", "b")]


@pytest.mark.parametrize("fixed", ["a", "b"])
def test_ops_with_ranges_that_do_not_follow_are_left_out(fixed: str) -> None:
    _, chains = chains_of(through(F.relu), torch.randn(ROWS), fixed=(fixed,))
    assert chains == []


@pytest.mark.parametrize("which", ["a", "b"])
def test_hooks_break_a_chain(which: str) -> None:
    net = through(F.relu)
    net.get_submodule(which).register_forward_hook(lambda module, x, y: None)
    assert chains_of(net, torch.randn(ROWS))[1] == []


def test_a_hook_on_a_consumers_input_breaks_a_chain() -> None:
    net = through(F.relu)
    net.b.register_forward_pre_hook(lambda module, x: None)
    assert chains_of(net, torch.randn(ROWS))[1] == []


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("which", ["a", "b"])
def test_a_parameter_that_another_module_has_breaks_a_chain(which: str, name: str) -> None:
    net = through(F.relu)
    setattr(net.c, name, getattr(net.get_submodule(which), name))
    assert chains_of(net, torch.randn(ROWS))[1] == []


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Offset(nn.BatchNorm2d):
    """A norm whose weight is counted from 1."""

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias)


class Relu3(nn.ReLU6):
    """A ReLU6 with another end than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, 0.0, 3.0)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (linears(lambda net, x: net.d(net.a(x)), d=Squared(6, 6)), ROWS),
        (linears(lambda net, x: net.a(net.d(x)), d=Squared(6, 6)), ROWS),
        (convs(lambda net, x: net.a(net.d(x)), d=Offset(3)), IMAGE),
        (convs(lambda net, x: net.b(net.d(net.a(x))), d=Relu3()), IMAGE),
    ],
    ids=["consumer", "producer", "norm", "relu6"],
)
def test_a_forward_of_the_users_own_breaks_a_chain(net: nn.Module, shape: tuple[int, ...]) -> None:
    assert chains_of(net, torch.randn(shape))[1] == []
