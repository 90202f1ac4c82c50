"""Predicted damage, against the divergence that the options really cause."""

import logging
from collections.abc import Iterator

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.tuner.nets import ALL, Attention, ConvNet, Functional, inputs_for, main_output, seeded
from tuner.config import TuningConfig
from tuner.preparation import Preparation, Prepared
from tuner.progress import Progress


def prepared(net: nn.Module, batches: list[object], space: str = "mixed-int") -> Prepared:
    preparation = Preparation(net, batches, None, TuningConfig(space=space))
    preparation.record()
    return preparation.finish(Progress(False))


class Classifier(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.out = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(main_output(self.body(x)).flatten(2).mean(1)) * 3  # type: ignore[no-any-return]


def _kl(net: nn.Module, x: torch.Tensor, reference: torch.Tensor) -> float:
    with torch.no_grad():
        log_q = torch.log_softmax(net(x), -1)
    return float((reference.exp() * (reference - log_q)).sum(-1).mean())


def _single_options(ready: Prepared) -> Iterator[tuple[dict[str, object], float]]:
    for unit, options in zip(ready.space.units, ready.space.space.units, strict=True):
        for choice, option in zip(unit.choices, options.options, strict=True):
            if not option.is_float:
                yield dict(choice.configs), option.damage


@pytest.mark.parametrize("body_type", [Attention, Functional])
def test_predicts_the_kl_divergence_of_single_options(body_type: type[nn.Module]) -> None:
    net = Classifier(seeded(body_type)).eval()
    x = torch.randn(64, 7, 16)
    ready = prepared(net, [x])
    with torch.no_grad():
        reference = torch.log_softmax(net(x), -1)
    predicted, measured = [], []
    for configs, damage in _single_options(ready):
        ready.model.apply(configs)  # type: ignore[arg-type]
        predicted.append(damage)
        measured.append(_kl(net, x, reference))
    assert len(predicted) > 30
    assert spearmanr(predicted, measured).statistic > 0.9
    ratio = torch.tensor(predicted).div(torch.tensor(measured).clamp_min(1e-12)).log()
    assert abs(float(ratio.median())) < 1.0  # of the right size, not only in the right order


@pytest.mark.parametrize("net_type", ALL)
def test_every_option_has_damage_and_more_bits_have_less(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    x = inputs_for(net, 16)
    before = [p.requires_grad for p in net.parameters()]
    ready = prepared(net, [x])
    assert [p.requires_grad for p in net.parameters()][: len(before)] == before
    for unit in ready.space.space.units:
        damage = {o.label: o.damage for o in unit.options}
        assert damage["FP32"] == 0
        high = next(damage[n] for n in ("W8A8", "W8", "A8") if n in damage)
        low = next(damage[n] for n in ("W2A4", "W2", "A4") if n in damage)
        assert 0 < high < low, unit.name


def test_without_gradients_output_errors_take_their_place() -> None:
    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = seeded(ConvNet)

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).argmax(-1)  # type: ignore[no-any-return]

    net = NoGrad().eval()
    ready = prepared(net, [torch.randn(16, 1, 8, 8)])
    for unit in ready.space.space.units:
        damage = {o.label: o.damage for o in unit.options}
        assert 0 < damage["W8A8"] < damage["W4A4"] < damage["W2A4"]


def test_a_backward_that_fails_is_said_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).exp()
            z = y * 2
            with torch.no_grad():
                y.add_(1.0)  # exp needs its output for the backward
            return z

    with caplog.at_level(logging.WARNING):
        ready = prepared(Breaks().eval(), [torch.randn(16, 8)])
    assert "no gradients" in caplog.text
    (unit,) = ready.space.space.units
    assert unit.options[0].damage > 0


def test_in_place_changes_of_operands_after_the_call_do_no_harm() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            y = self.linear(x)
            x.zero_()
            return y + x

    torch.manual_seed(0)
    net, x = Later().eval(), torch.randn(16, 8)
    (unit,) = prepared(net, [x]).space.space.units
    torch.manual_seed(0)
    (plain,) = prepared(nn.Sequential(nn.Linear(8, 8)).eval(), [x]).space.space.units
    assert [o.damage for o in unit.options] == pytest.approx([o.damage for o in plain.options])


class _Recurrent(nn.Module):
    def __init__(self, packs: bool) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)
        self.packs = packs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packs:
            return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]
        packed = pack_padded_sequence(x, [5] * len(x), batch_first=True)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])  # type: ignore[no-any-return]


def test_packed_sequences_have_the_damage_of_padded_ones() -> None:
    x = torch.randn(16, 5, 8)
    damages = []
    for packs in (True, False):
        torch.manual_seed(0)
        units = prepared(_Recurrent(packs).eval(), [x]).space.space.units
        damages.append([option.damage for unit in units for option in unit.options])
    assert damages[0] == pytest.approx(damages[1], rel=1e-4)
