"""Errors weighed by gradients: finite, whatever the outputs are."""

import warnings

import torch
from torch import Tensor, nn

from tuner import NothingQuantizedWarning, TuningConfig, quantization
from tuner.gradients import output_errors

_FP32 = 1e-6  # relative


def test_errors_are_weighed_by_the_gradient() -> None:
    reference, gradient, found = torch.randn(3, 2, 4).unbind()
    errors = output_errors(reference, gradient, [found, reference])
    torch.testing.assert_close(
        errors[0], ((found - reference) * gradient).flatten(), rtol=_FP32, atol=0.0
    )
    assert not errors[1].any()


def test_without_a_gradient_errors_are_relative_to_the_output() -> None:
    reference, found = torch.randn(2, 4), torch.randn(2, 4)
    errors = output_errors(reference, None, [found])
    expected = (found - reference) / (reference.square().sum() / 2).sqrt()
    torch.testing.assert_close(errors[0], expected.flatten(), rtol=_FP32, atol=0.0)


def test_what_overflows_harms_most_and_sums_stay_finite() -> None:
    reference = torch.ones(1, 4)
    found = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1e30]])
    errors = output_errors(reference, torch.ones(1, 4), [found] * 2)
    assert torch.equal(errors[0], torch.tensor([1e12, -1e12, 0.0, 1e12]))
    assert bool((errors @ errors.T).isfinite().all())


class NearlyFull(nn.Module):
    """A half-precision network whose hidden values reach the largest number of its type."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(16, 32, bias=False)
        self.b = nn.Linear(32, 5)
        self.a.weight.data.abs_()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) / 65504)  # type: ignore[no-any-return]


def test_an_op_that_overflows_when_it_is_quantized_is_no_end_of_the_search() -> None:
    x = torch.rand(64, 16, generator=torch.Generator().manual_seed(1)).half()
    net = NearlyFull().half().eval()
    with torch.no_grad():
        net.a.weight *= 65480 / float(net.a(x).max())
        assert bool(net.a(x).isfinite().all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        config = TuningConfig(space="mixed-int", max_trials=2)
        model = quantization.fit(
            net, [x], lambda m: float(m(x).detach().std().nan_to_num()), config
        )
    damages = [row.predicted_damage for row in model.result.op_table]
    assert all(damage < float("inf") for damage in damages)
