"""Statistics taken anew are the plain averages over batches, and nothing else changes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import ConvNet, seeded
from tests.tuner.recovery.problems import normal
from tuner.errors import DataError
from tuner.model import InstrumentedModel
from tuner.recovery import folding
from tuner.recovery.bn_reestimation import reestimate_batch_norms

FP32_SUMS = 1e-5


class Net(nn.Module):
    """A norm, dropout, a norm without statistics, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.second = nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)
        self.unused = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.second(self.drop(self.norm(x)) * 2 + 1))  # type: ignore[no-any-return]


def batches() -> list[Tensor]:
    return [normal(i, 6 + i, 4) * (i + 1) + i for i in range(3)]


def modes(model: nn.Module) -> list[object]:
    found: list[object] = []
    for module in model.modules():
        tracked = getattr(module, "num_batches_tracked", None)
        count = None if tracked is None else int(tracked)
        found.append((module.training, getattr(module, "momentum", None), count))
    return found


def test_mean_and_variance_are_the_averages_over_batches() -> None:
    model = Net().eval()
    model.second.num_batches_tracked.fill_(7)
    before = modes(model)
    assert reestimate_batch_norms(model, batches()) == 3
    for norm, inputs in ((model.norm, batches()), (model.second, _second_inputs())):
        mean = torch.stack([x.double().mean(0) for x in inputs]).mean(0)
        variance = torch.stack([x.double().var(0) for x in inputs]).mean(0)
        for ours, theirs in ((norm.running_mean, mean), (norm.running_var, variance)):
            torch.testing.assert_close(ours.double(), theirs, rtol=FP32_SUMS, atol=FP32_SUMS)
    assert modes(model) == before
    assert torch.equal(model.unused.running_var, torch.ones(4))


def _second_inputs() -> list[Tensor]:
    """Return what reaches the second norm: dropout is off, the first norm uses each batch."""
    eps = nn.BatchNorm1d(4).eps
    return [(x - x.mean(0)) / (x.var(0, unbiased=False) + eps).sqrt() * 2 + 1 for x in batches()]


def test_a_model_in_training_mode_stays_in_it() -> None:
    model = Net().train()
    model.norm.eval()
    before = modes(model)
    torch.manual_seed(0)
    reestimate_batch_norms(model, batches())
    assert modes(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_batches_go_through_feed_without_gradients() -> None:
    model = Net().eval()
    gradients = []

    def feed(model: nn.Module, batch: dict[str, Tensor]) -> None:
        gradients.append(torch.is_grad_enabled())
        model(batch["x"])

    reestimate_batch_norms(model, [{"x": x} for x in batches()], feed)
    assert gradients == [False] * 3
    expected = Net().eval()
    reestimate_batch_norms(expected, batches())
    assert torch.equal(model.norm.running_mean, expected.norm.running_mean)


def failing() -> Iterator[Tensor]:
    yield batches()[0]
    raise RuntimeError("the file ended")


@pytest.mark.parametrize("bad", ["a batch", "one value a channel", "none"])
def test_where_it_fails_everything_is_as_before(bad: str) -> None:
    model = Net().eval()
    model.second.num_batches_tracked.fill_(7)
    before, state = modes(model), {k: v.clone() for k, v in model.state_dict().items()}
    if bad == "a batch":
        with pytest.raises(RuntimeError, match="the file ended"):
            reestimate_batch_norms(model, failing())
    elif bad == "one value a channel":
        with pytest.raises(DataError, match="batch 1 gives a batch norm one value a channel"):
            reestimate_batch_norms(model, [batches()[0], torch.zeros(1, 4)])
    else:
        with pytest.raises(DataError, match="no batches"):
            reestimate_batch_norms(model, [])
    assert modes(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_another_error_of_the_model_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        reestimate_batch_norms(Net().eval(), [torch.zeros(4)])


def test_a_model_without_norms_reads_no_batches() -> None:
    assert reestimate_batch_norms(nn.Linear(2, 2), failing()) == 0


def test_folded_norms_are_left_out() -> None:
    model, x = seeded(ConvNet), normal(0, 4, 1, 8, 8)
    graph = InstrumentedModel(model).record(lambda: model(x), 4)
    first, *_ = folding.find_pairs(model, graph)
    for name, weight in folding.fold(model, [first]).items():
        model.get_parameter(name).data = weight
    folded = model.get_submodule(first.norm)
    kept = {name: b.clone() for name, b in folded.named_buffers()}
    assert reestimate_batch_norms(model, [x]) == 1
    for name, value in folded.named_buffers():
        assert torch.equal(value, kept[name])


def test_norms_of_a_watched_model_are_found() -> None:
    """While functional calls are watched, every module has another class."""

    class Silent:
        def run(self, site: object, call: object) -> object:
            return call.invoke(lambda index, x: x)  # type: ignore[attr-defined]

        def other(self, scope: str, fn: object, args: object, kwargs: object) -> object:
            return fn(*args, **kwargs)  # type: ignore[operator]

    model = seeded(ConvNet)
    with InstrumentedModel(model).watching(Silent()):  # type: ignore[arg-type]
        assert reestimate_batch_norms(model, [normal(0, 4, 1, 8, 8)]) == 2
