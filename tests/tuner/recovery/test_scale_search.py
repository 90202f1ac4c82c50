"""Factors of chains: those of the papers' equations, and of them those that harm least."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.recovery.chain_nets import Net, chains_of, spread
from tests.tuner.recovery.problems import Watch
from tuner import OpConfig, PerChannel, PerGroup, TensorScheme
from tuner.batches import Feeder
from tuner.gradients import GradientPass
from tuner.recovery.chains import Chain
from tuner.recovery.channels import ChannelStatistics
from tuner.recovery.layers import channel_axis
from tuner.recovery.scale_search import ALPHAS, ScaleSearch
from tuner.repairs import (
    AWQ,
    BIAS_ABSORPTION,
    EQUALIZATION,
    FACTORS,
    SCALINGS,
    SMOOTHQUANT,
    Repair,
    name_of,
)

_FP32 = 1e-5  # relative, of factors
_NEAR_BEST = 1.3  # times the divergence of the best candidate
_W8 = TensorScheme(granularity=PerChannel(0))
_A8 = TensorScheme(format="uint8", symmetric=False)
W8A8 = OpConfig(weight=_W8, inputs=(_A8,))
W3 = OpConfig(weight=TensorScheme(format="int3", granularity=PerGroup(16)))


def mlp(width: int = 32) -> Net:
    """Two linear layers with relu between, whose hidden channels differ in size."""
    torch.manual_seed(0)
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(16, width), b=nn.Linear(width, 5))
    factors = 100 ** torch.rand(width)
    net.a.weight.data *= factors[:, None]
    net.a.bias.data *= factors
    net.b.weight.data *= 3 / factors * 10 ** torch.rand(width)
    return net


def search_of(
    net: nn.Module, x: Tensor, configs: Sequence[OpConfig], allowed: tuple[str, ...] = SCALINGS
) -> tuple[ScaleSearch, list[Chain]]:
    """Return a search over the chains of a network, all consumers with the same options."""
    model, chains = chains_of(net, x)
    watch = Watch()
    with torch.no_grad(), model.watching(watch):
        net(x)
    channels, consumers = {}, [name for chain in chains for name in chain.consumers]
    for chain in chains:
        first = chain.consumers[0]
        channels[chain.producer] = ChannelStatistics(channel_axis(net.get_submodule(first)))
        for call in watch.calls[first]:
            channels[chain.producer].update(call.operands[0])
    calls, _ = next(GradientPass(model, Feeder(net), 0).parts(x, 64, consumers))
    options = dict.fromkeys(consumers, configs)
    return ScaleSearch(model, channels, calls, options, allowed), chains


def affine(x: Tensor) -> Tensor:
    """Round to uint8 between the extremes, by torch's own operation."""
    low, high = float(x.min().clamp_max(0)), float(x.max().clamp_min(0))
    scale = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)


def rows(weight: Tensor) -> Tensor:
    """Round rows to int8, by torch's own operation."""
    scale = weight.abs().amax(1) / 127
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -128, 127)


def groups(weight: Tensor) -> Tensor:
    """Round to int3 in groups of 16 along a row."""
    parts = weight.view(weight.shape[0], -1, 16)
    scale = parts.abs().amax(-1, keepdim=True) / 3.5
    return ((parts / scale).round().clamp(-4, 3) * scale).view_as(weight)


@torch.no_grad()
def divergence(net: Any, x: Tensor, factors: Tensor, quantizes_input: bool) -> float:
    """Return the KL divergence of the outputs with the scaled consumer quantized."""
    hidden, expected = net.a(x).relu() / factors, net(x).log_softmax(-1)
    weight = net.b.weight * factors
    hidden, weight = (affine(hidden), rows(weight)) if quantizes_input else (hidden, groups(weight))
    found = (hidden @ weight.T + net.b.bias).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def candidates(net: Any, x: Tensor, repair: str) -> dict[float, Tensor]:
    """Return the factors of the papers' equations, by alpha."""
    hidden = net.a(x).relu()
    columns = net.b.weight.abs().amax(0)
    if repair == EQUALIZATION:
        return {0.0: (net.a.weight.abs().amax(1) / columns).sqrt()}
    if repair == AWQ:
        return {alpha: hidden.abs().mean(0) ** alpha for alpha in ALPHAS}
    largest = hidden.abs().amax(0)
    return {alpha: largest**alpha / columns ** (1 - alpha) for alpha in ALPHAS}


@pytest.mark.parametrize(
    ("config", "repairs"), [(W8A8, (EQUALIZATION, SMOOTHQUANT)), (W3, (EQUALIZATION, AWQ))]
)
def test_the_choice_is_nearly_the_best_of_all(config: OpConfig, repairs: tuple[str, ...]) -> None:
    net, x = mlp(), torch.randn(64, 16)
    with_input = config.inputs is not None
    search, (chain,) = search_of(net, x, [config])
    best = search.best(chain)
    assert best is not None
    assert name_of(best.repair) in repairs
    harms = [
        divergence(net, x, factors, with_input)
        for repair in repairs
        for factors in candidates(net, x, repair).values()
    ]
    found = divergence(net, x, best.factors.float(), with_input)
    assert found <= _NEAR_BEST * min(harms)
    assert found < divergence(net, x, torch.ones(32), with_input) / 2
    assert best.gain > 2


@pytest.mark.parametrize("repair", FACTORS)
def test_factors_are_those_of_the_papers(repair: str) -> None:
    net, x = mlp(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    expected = candidates(net, x, repair)
    for alpha in (0.25, 0.75) if repair != EQUALIZATION else (0.0,):
        wanted = Repair(name=repair, alpha=alpha) if alpha else repair
        found = search.best(chain, (wanted,))
        assert found is not None
        assert found.repair == wanted
        torch.testing.assert_close(found.factors.float(), expected[alpha], rtol=_FP32, atol=0.0)


@pytest.mark.parametrize("repair", [SMOOTHQUANT, AWQ])
def test_the_best_alpha_is_taken_where_none_is_given(repair: str) -> None:
    net, x = mlp(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    found = search.best(chain, (repair,))
    assert found is not None
    gains = {}
    for alpha in ALPHAS:
        one = search.best(chain, (Repair(name=repair, alpha=alpha),))
        assert one is not None
        gains[alpha] = one.gain
    best = max(gains, key=gains.__getitem__)
    assert found.repair == Repair(name=repair, alpha=best)
    assert found.gain == gains[best]


@pytest.mark.parametrize("allowed", [(), (AWQ,)])
def test_what_is_not_allowed_is_not_proposed(allowed: tuple[str, ...]) -> None:
    search, (chain,) = search_of(mlp(), torch.randn(64, 16), [W8A8], allowed)
    assert search.best(chain) is None
    assert search.best(chain, (SMOOTHQUANT,)) is not None  # asked for, it is done


def test_equal_channels_are_left_alone() -> None:
    net = mlp()
    net.a.weight.data = torch.randn(1, 16).expand(32, 16).clone()
    net.a.bias.data.fill_(0.1)
    net.b.weight.data = torch.randn(5, 1).expand(5, 32).clone()
    search, (chain,) = search_of(net, torch.randn(64, 16), [W8A8])
    assert search.best(chain) is None


def test_the_search_leaves_the_model_as_it_is() -> None:
    net, x = mlp(), torch.randn(64, 16)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    search, (chain,) = search_of(net, x, [W8A8, W3])
    search.best(chain)
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_norm_has_no_rows_to_equalize() -> None:
    torch.manual_seed(0)
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.LayerNorm(16), b=nn.Linear(16, 5))
    spread(net, largest=300.0)
    search, (chain,) = search_of(net, torch.randn(64, 16), [W8A8])
    assert search.best(chain, (EQUALIZATION,)) is None
    best = search.best(chain)
    assert best is not None
    assert name_of(best.repair) == SMOOTHQUANT


def test_all_consumers_count() -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(16, 8), "b": nn.Linear(8, 5), "c": nn.Linear(8, 5)}
    net: Any = Net(lambda net, x: (lambda y: net.b(y) + net.c(y))(net.a(x).relu()), **layers)
    net.b.weight.data[:, 1], net.c.weight.data[:, 2] = 50.0, 70.0
    x = torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    found = search.best(chain, (EQUALIZATION,))
    assert found is not None
    columns = torch.maximum(net.b.weight.abs().amax(0), net.c.weight.abs().amax(0))
    expected = (net.a.weight.abs().amax(1) / columns).sqrt()
    torch.testing.assert_close(found.factors.float(), expected, rtol=_FP32, atol=0.0)


def test_flattened_positions_share_a_factor() -> None:
    torch.manual_seed(0)
    net: Any = Net(
        lambda net, x: net.b(net.a(x).relu().flatten(1)), a=nn.Conv2d(2, 4, 3), b=nn.Linear(64, 5)
    )
    spread(net)
    x = torch.randn(32, 2, 6, 6)
    search, (chain,) = search_of(net, x, [W8A8])
    found = search.best(chain, (Repair(name=SMOOTHQUANT, alpha=0.5),))
    assert found is not None
    largest = net.a(x).relu().amax((0, 2, 3))
    columns = net.b.weight.abs().view(5, 4, 16).amax((0, 2))
    torch.testing.assert_close(
        found.factors.float(), (largest / columns).sqrt(), rtol=_FP32, atol=0.0
    )


def test_a_dead_channel_keeps_its_factor() -> None:
    net, x = mlp(), torch.randn(64, 16)
    net.a.weight.data[3], net.a.bias.data[3] = 0.0, -1.0
    net.b.weight.data[:, 5] = 0.0
    search, (chain,) = search_of(net, x, [W8A8])
    for repair in FACTORS:
        found = search.best(chain, (repair,))
        assert found is not None
        assert float(found.factors[3]) == 1.0
        assert bool(found.factors.isfinite().all() & (found.factors > 0).all())


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gets_powers_of_two(which: str, dtype: torch.dtype) -> None:
    net, x = mlp(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    weight = net.get_submodule(which).get_parameter("weight")
    weight.data = weight.data.to(dtype)
    factors = ScaleSearch._exact(search, chain, torch.tensor([0.3, 1.0, 900.0]))
    assert factors.tolist() == [0.25, 1.0, 1024.0]


def test_autocast_gets_powers_of_two() -> None:
    net, x = mlp(), torch.randn(64, 16)
    plain = net.run

    def run(net: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(net, x)

    net.run = run
    search, (chain,) = search_of(net, x, [W8A8])
    found = search.best(chain)
    assert found is not None
    assert torch.equal(found.factors, found.factors.log2().round().exp2())


def test_channels_that_calibration_never_saw_do_harm_to_nobody() -> None:
    """Options without captured calls: what is asked for is done, nothing else."""
    net, x = mlp(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    blind = ScaleSearch(search.model, search.channels, {}, search.configs)
    assert blind.best(chain) is None
    assert blind.best(chain, (EQUALIZATION,)) is not None
    nothing = ScaleSearch(search.model, search.channels, search.calls, {})
    assert nothing.best(chain) is None


def high() -> Any:
    """A layer norm, some channels of which lie far from 0, and a linear layer behind it."""
    torch.manual_seed(0)
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.LayerNorm(16), b=nn.Linear(16, 5))
    net.a.bias.data[::3] = torch.linspace(-40, 60, 6)
    net.b.bias.data -= net.b.weight @ net.a.bias
    return net


@torch.no_grad()
def centred(net: Any, x: Tensor, factors: Tensor | float, shifts: Tensor | float) -> float:
    """Return the KL divergence with (x − shifts) / factors and the weight to it quantized."""
    hidden, expected = (net.a(x) - shifts) / factors, net(x).log_softmax(-1)
    bias = net.b.bias + (net.b.weight * shifts).sum(1)
    found = (affine(hidden) @ rows(net.b.weight * factors).T + bias).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@torch.no_grad()
def test_what_lies_high_is_absorbed() -> None:
    net, x = high(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    best = search.best(chain)
    assert best is not None
    assert best.shifts is not None
    assert BIAS_ABSORPTION in map(name_of, best.repairs)
    hidden = net.a(x)
    middle = (hidden.amin(0) + hidden.amax(0)) / 2
    torch.testing.assert_close(best.shifts.float(), middle, rtol=_FP32, atol=_FP32)
    plain = centred(net, x, 1.0, 0.0)
    found = centred(net, x, best.factors.float(), best.shifts.float())
    assert found < plain / 20
    assert plain / found / 3 < best.gain < 3 * plain / found
    without = search_of(net, x, [W8A8], FACTORS)[0].best(chain)
    assert without is None or centred(net, x, without.factors.float(), 0.0) > 5 * found


@torch.no_grad()
def test_factors_of_smoothquant_are_those_of_centred_channels() -> None:
    net, x = high(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    found = search.best(chain, (Repair(name=SMOOTHQUANT, alpha=0.5), BIAS_ABSORPTION))
    assert found is not None
    hidden = net.a(x)
    reach, columns = (hidden.amax(0) - hidden.amin(0)) / 2, net.b.weight.abs().amax(0)
    torch.testing.assert_close(found.factors.float(), (reach / columns).sqrt(), rtol=1e-4, atol=0.0)
    assert found.repairs == (Repair(name=SMOOTHQUANT, alpha=0.5), BIAS_ABSORPTION)


def test_what_is_asked_for_is_all_that_is_done() -> None:
    net, x = high(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    alone, divided = search.best(chain, (BIAS_ABSORPTION,)), search.best(chain, (SMOOTHQUANT,))
    assert alone is not None
    assert alone.repairs == (BIAS_ABSORPTION,)
    assert torch.equal(alone.factors, torch.ones(16).double())
    assert divided is not None
    assert divided.shifts is None


@torch.no_grad()
def test_through_a_relu_the_minimum_is_absorbed() -> None:
    net: Any = Net(
        lambda net, x: net.b(net.a(x).relu().flatten(1)), a=nn.Conv2d(2, 4, 3), b=nn.Linear(64, 5)
    )
    x = torch.randn(32, 2, 6, 6)
    net.a.bias.data[1:3] += 20.0
    search, (chain,) = search_of(net, x, [W8A8])
    best = search.best(chain)
    assert best is not None
    assert best.shifts is not None
    hidden = net.a(x).relu()
    low, high = hidden.amin((0, 2, 3)), hidden.amax((0, 2, 3))
    below = (low - (high - low) / 4).clamp_min(0)
    assert below.count_nonzero() == 2
    torch.testing.assert_close(best.shifts.float(), below, rtol=_FP32, atol=0.0)


def test_channels_about_zero_have_nothing_to_absorb() -> None:
    net, x = mlp(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    assert chain.offset == "minimum"
    assert search.best(chain, (BIAS_ABSORPTION,)) is None
    assert search.best(chain, (EQUALIZATION, BIAS_ABSORPTION)) is None  # not half of it
    best = search.best(chain)
    assert best is not None
    assert best.shifts is None


def test_where_only_weights_are_quantized_nothing_is_absorbed_unasked() -> None:
    net, x = high(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W3])
    best = search.best(chain)
    assert best is None or best.shifts is None
    assert search.best(chain, (BIAS_ABSORPTION,)) is not None


@pytest.mark.parametrize("which", ["a", "b"])
def test_half_precision_absorbs_nothing(which: str) -> None:
    net, x = high(), torch.randn(64, 16)
    search, (chain,) = search_of(net, x, [W8A8])
    weight = net.get_submodule(which).get_parameter("weight")
    weight.data = weight.data.to(torch.bfloat16)
    assert ScaleSearch._shifts(search, chain, search.channels["a"]) is None


def test_the_search_leaves_biases_as_they_are() -> None:
    net, x = high(), torch.randn(64, 16)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    search, (chain,) = search_of(net, x, [W8A8, W3])
    search.best(chain)
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
