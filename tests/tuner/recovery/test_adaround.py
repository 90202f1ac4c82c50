"""AdaRound and coordinate descent against brute force, GPTQ, and their own grid."""

import pytest
import torch

from tests.tuner.recovery import references
from tests.tuner.recovery.problems import correlated, normal
from tests.tuner.recovery.weight_schemes import cases, in_dtype, others
from tuner import formats
from tuner.granularity import PerChannel
from tuner.qparams import compute_qparams, fake_quantize
from tuner.recovery.adaround import adaround
from tuner.recovery.gptq import gptq
from tuner.recovery.rounding_descent import descended
from tuner.recovery.rounding_matrix import as_matrix, damped, output_errors
from tuner.recovery.rounding_problem import RoundingProblem
from tuner.schemes import TensorScheme

REACHED = 1.001  # times the best error of all ways to round up or down
MOST = 0.8  # of the problems
GAIN = 0.96  # of the error of the simpler way, over a few problems
SAME_ERROR = 1e-5  # relative: sums in fp32 and in fp64
INT2 = TensorScheme(format="int2", granularity=PerChannel(0))
INT4 = TensorScheme(format="int4", granularity=PerChannel(0))
E2M1 = TensorScheme(format="e2m1", granularity=PerChannel(0))


def values(scheme: TensorScheme, scale: float) -> list[float]:
    """Return the values of a grid in growing order."""
    if formats.get(scheme.format).kind == "int":
        low, high = scheme.quant_range
        return [code * scale for code in range(low, high + 1)]
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    return [m * scale for m in (*(-m for m in magnitudes[:0:-1]), *magnitudes)]


@pytest.mark.parametrize("scheme", [INT2, INT4, E2M1], ids=lambda scheme: scheme.format)
def test_the_best_way_to_round_up_or_down_is_reached_in_most_problems(scheme: TensorScheme) -> None:
    reached = []
    for seed in range(5):
        weight, second = normal(seed, 12, 6), correlated(seed, 1, 6)
        rounded, qparams = adaround(weight, second, scheme)
        scales = torch.as_tensor(qparams.scale).tolist()
        for row in range(12):
            grid = values(scheme, scales[row])
            options = [references.around(float(w), grid) for w in weight[row]]
            best = references.best_choice(weight[row], second[0], options)
            mine = references.error(rounded[row, None], weight[row, None], second[0])
            reached.append(mine <= best * REACHED)
    assert sum(reached) / len(reached) >= MOST


def test_better_than_gptq_and_than_coordinate_descent_alone() -> None:
    errors = []
    for seed in range(3):
        weight, second = normal(seed, 32, 48), correlated(seed, 1, 48)
        solutions = (
            gptq(weight, second, INT4)[0],
            adaround(weight, second, INT4, steps=0)[0],
            adaround(weight, second, INT4)[0],
        )
        errors.append([references.error(w, weight, second[0]) for w in solutions])
    by_gptq, by_descent, learned = torch.tensor(errors).sum(0).tolist()
    assert learned < GAIN * by_descent
    assert by_descent < GAIN * by_gptq


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["presets", "others"])
def test_the_result_lies_on_the_grid_and_is_never_worse(which: str, dtype: torch.dtype) -> None:
    for case in cases() if which == "presets" else others():
        case = in_dtype(case, dtype)
        weight, second = case.weight, case.second
        rounded, qparams = adaround(weight, second, case.scheme, axis=case.axis, steps=20)
        assert rounded.dtype == dtype
        assert torch.equal(fake_quantize(rounded, case.scheme, qparams), rounded), case.scheme
        plain = fake_quantize(weight, case.scheme, qparams)
        mine, theirs = (
            float(
                output_errors(
                    as_matrix(w.float() - weight.float(), len(second), case.axis), second
                ).sum()
            )
            for w in (rounded, plain)
        )
        assert mine <= theirs * (1 + SAME_ERROR), case.scheme


def test_the_same_problem_has_the_same_solution() -> None:
    weight, second = normal(0, 8, 12), correlated(0, 1, 12)
    state = torch.get_rng_state()
    first, _ = adaround(weight, second, INT2, steps=50)
    torch.rand(3)
    again, _ = adaround(weight, second, INT2, steps=50)
    assert torch.equal(first, again)
    torch.set_rng_state(state)


def test_under_gradients_and_inference_mode() -> None:
    weight, second = torch.nn.Parameter(normal(0, 4, 6)), correlated(0, 1, 6)
    rounded, _ = adaround(weight, second, INT2, steps=10)
    assert not rounded.requires_grad
    assert weight.grad is None
    with torch.inference_mode():
        inside, _ = adaround(weight, second, INT2, steps=10)
    assert torch.equal(inside, rounded)


@pytest.mark.parametrize("width", [1, 7, 130])
def test_each_sweep_lowers_the_damped_error(width: int) -> None:
    """130 columns are two blocks."""
    weight, second = normal(0, 6, width), correlated(1, 1, width)
    problem = RoundingProblem.of(weight, second, INT4, 0, None)
    errors = []
    for sweeps in range(4):
        solution = descended(problem, problem.nearest, sweeps)
        delta = (solution - problem.columns).mT
        errors.append(float(output_errors(delta, damped(second, 0.01)).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0] or width == 1


def test_a_sweep_leaves_each_column_at_its_best() -> None:
    """At a fixed point no single value can be exchanged for a better one."""
    weight, second = normal(0, 1, 8), correlated(0, 1, 8)
    problem = RoundingProblem.of(weight, second, INT4, 0, None)
    solution = descended(problem, problem.nearest, 20)[0, :, 0]
    hessian = damped(second, 0.01)[0]
    scale = compute_qparams(weight, INT4).scale
    best = references.error(solution[None], weight, hessian)
    for column in range(8):
        for value in values(INT4, float(scale)):
            other = solution.clone()
            other[column] = value
            assert references.error(other[None], weight, hessian) >= best * (1 - SAME_ERROR)


def test_what_gptq_would_not_round_is_rounded_to_nearest() -> None:
    weight = normal(0, 4, 6)
    rounded, _ = adaround(weight, torch.zeros(1, 6, 6), INT4)
    assert torch.equal(rounded, fake_quantize(weight, INT4))
