"""sweep(): what each format does to weights, inputs and both, and how that is shown."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.nets import Recurrent, Tied, inputs_for, main_output, seeded
from tuner import (
    AccuracyGoal,
    OpConfig,
    PerChannel,
    PerToken,
    TensorScheme,
    TunerError,
    TuningCancelled,
    quantization,
)
from tuner.errors import (
    DataError,
    EvaluationError,
    ModelError,
    SpaceError,
    UnknownNameError,
    UnsupportedError,
)

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
SVG = "{http://www.w3.org/2000/svg}"


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def seen_outputs(net: nn.Module, formats: Any, **options: Any) -> dict[tuple[str, str], Tensor]:
    """Return the outputs on X that eval_func saw, by (format, part)."""
    outputs: list[Tensor] = []

    def eval_func(model: nn.Module) -> float:
        with torch.no_grad():
            outputs.append(model(X))
        return 1.0

    result = quantization.sweep(net, [X], eval_func, formats, progress=False, **options)
    assert len(outputs) == 1 + len(result.rows)
    assert torch.equal(outputs[0], net(X))
    keys = [(row.format, row.part) for row in result.rows]
    return dict(zip(keys, outputs[1:], strict=True))


def agreement(model: nn.Module) -> float:
    with torch.no_grad():
        labels = mlp()(X).argmax(1)
        return float((model(X).argmax(1) == labels).float().mean())


# ---------------------------------------------------------------- numerics


def test_int8_weights_equal_torchs_fake_quantization() -> None:
    net = mlp()
    x = X
    for layer in (net[0], net[2]):
        w = layer.weight.detach()
        scale, zeros = w.abs().amax(1) / 127, torch.zeros(len(w), dtype=torch.int32)
        w8 = torch.fake_quantize_per_channel_affine(w, scale, zeros, 0, -128, 127)
        x = F.linear(F.relu(x) if layer is net[2] else x, w8, layer.bias)
    seen = seen_outputs(net, ["int8"])
    assert torch.allclose(seen["int8", "weights"], x, atol=1e-6)
    assert not torch.allclose(seen["int8", "both"], x, atol=1e-4)


def test_e4m3_inputs_equal_torchs_float8() -> None:
    net = mlp()

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().max() / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    with torch.no_grad():
        hidden = F.relu(net[0](rounded(X)))
        scale = F.relu(net[0](X)).abs().max() / 448  # calibrated on the float model
        hidden = (hidden / scale).clamp(max=448).to(torch.float8_e4m3fn).float() * scale
        assert torch.allclose(
            seen_outputs(net, ["e4m3fn"])["e4m3fn", "inputs"], net[2](hidden), atol=1e-5
        )


AS_PRESETS = OpConfig(
    weight=TensorScheme(format="int4", granularity=PerChannel(0), calibration="mse"),
    inputs=TensorScheme(format="uint4", symmetric=False, calibration="mse"),
)


@pytest.mark.parametrize("part", ["weights", "inputs", "both"])
@pytest.mark.parametrize(
    ("entry", "config"),
    [
        ("int4", AS_PRESETS),
        (("mine", AS_PRESETS), AS_PRESETS),
        (
            "mxfp4",
            OpConfig(weight=TensorScheme(format="mxfp4"), inputs=TensorScheme(format="mxfp4")),
        ),
        (
            TensorScheme(format="int3", granularity=PerToken()),
            OpConfig(
                weight=TensorScheme(format="int3", granularity=PerToken()),
                inputs=TensorScheme(format="int3", granularity=PerToken()),
            ),
        ),
    ],
    ids=["name", "pair", "block", "scheme"],
)
def test_a_row_is_what_simulate_gives(entry: Any, config: OpConfig, part: str) -> None:
    seen = seen_outputs(mlp(), [entry])
    (output,) = (out for (_, of), out in seen.items() if of == part)
    weights = config.weight if part != "inputs" else None
    inputs = config.inputs if part != "weights" else None
    sim = quantization.simulate(mlp(), inputs, weights, calib_dataloader=[X])  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(output, sim(X))


@pytest.mark.parametrize("net_type", [Tied, Recurrent])
def test_embeddings_and_tied_weights_are_swept(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    x = inputs_for(net)
    reference = main_output(net(x)).detach()

    def fidelity(model: nn.Module) -> float:
        with torch.no_grad():
            return float(-(main_output(model(x)) - reference).norm())

    result = quantization.sweep(net, [x], fidelity, ["int8", "int3", "nf4"], progress=False)
    assert [row.error for row in result.rows] == [None] * 9
    score = {(row.format, row.part): row.accuracy for row in result.rows}
    assert score["int3", "weights"] < score["int8", "weights"] < 0  # type: ignore[operator]
    assert score["int3", "both"] < score["int8", "both"] < 0  # type: ignore[operator]


# ---------------------------------------------------------------- how it runs


def test_data_are_read_once_and_the_model_is_left_as_it_was() -> None:
    net = mlp().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    read, calls = [], []

    def batches() -> Any:
        for batch in X.split(16):
            read.append(len(batch))
            yield batch

    def eval_func(model: nn.Module) -> float:
        calls.append(type(model))
        assert not model.training
        return agreement(model)

    state = torch.get_rng_state()
    result = quantization.sweep(net, batches(), eval_func, ["int8", "int2"], calib_samples=32)
    assert read == [16, 16]
    assert calls == [nn.Sequential] * 7
    assert net.training
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [(row.format, row.bits, row.part) for row in result.rows] == [
        (name, bits, part)
        for name, bits in (("int8", 8), ("int2", 2))
        for part in ("weights", "inputs", "both")
    ]


def test_a_failure_and_nan_are_rows_and_the_sweep_goes_on() -> None:
    scores = iter([0.8, 0.8, float("nan"), None, 0.4])

    def eval_func(model: nn.Module) -> float:
        score = next(scores)
        if score is None:
            raise ValueError("out of beans")
        return score

    result = quantization.sweep(
        mlp(), [X], eval_func, ["int8", "int4"], parts=["weights", "both"], progress=False
    )
    accuracies = [row.accuracy for row in result.rows]
    assert accuracies == [0.8, None, None, 0.4]
    assert [row.reason and row.reason.split(":")[-1] for row in result.rows] == [
        None,
        " a score must be finite",
        " out of beans",
        None,
    ]
    assert [row.meets_goal for row in result.rows] == [True, None, None, False]
    assert result.rows[3].drop == pytest.approx(0.5)
    assert "int4 weights failed: ValueError: out of beans" in result.summary()


def test_what_fails_on_fp32_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        quantization.sweep(mlp(), [X], lambda m: 1 / 0)
    with pytest.raises(EvaluationError, match="finite"):
        quantization.sweep(mlp(), [X], lambda m: math.nan)


def test_cancelling_keeps_the_rows_so_far() -> None:
    calls = iter(range(9))

    def eval_func(model: nn.Module) -> float:
        if next(calls) == 3:
            raise TuningCancelled
        return 1.0

    result = quantization.sweep(mlp(), [X], eval_func, progress=False)
    assert [row.part for row in result.rows] == ["weights", "inputs"]


@pytest.mark.parametrize(
    ("goal", "score", "drop", "met"),
    [
        (AccuracyGoal(), 0.4, 0.2, False),
        (AccuracyGoal(max_drop=0.3), 0.4, 0.2, True),
        (AccuracyGoal(higher_is_better=False), 0.6, 0.2, False),
        (AccuracyGoal(higher_is_better=False), 0.4, -0.2, True),
    ],
)
def test_drops_follow_the_direction(
    goal: AccuracyGoal, score: float, drop: float, met: bool
) -> None:
    scores = iter([0.5, score])
    result = quantization.sweep(
        mlp(), [X], lambda m: next(scores), ["int8"], parts=["both"], goal=goal, progress=False
    )
    (row,) = result.rows
    assert row.drop == pytest.approx(drop)
    assert row.meets_goal is met


def test_a_baseline_of_0_has_no_relative_drop() -> None:
    scores = iter([0.0, -1.0])
    result = quantization.sweep(
        mlp(), [X], lambda m: next(scores), ["int8"], parts=["both"], progress=False
    )
    assert result.rows[0].drop is None
    assert "−1" not in result.summary()
    assert "int8    8     -1" in result.summary()


def test_progress_is_silent_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (None, False):
        quantization.sweep(mlp(), [X], agreement, ["int8"], progress=progress)
        assert capsys.readouterr() == ("", "")
    quantization.sweep(mlp(), [X], agreement, ["int8"], progress=True)
    shown = capsys.readouterr().err
    assert "calibrating" in shown
    assert "int8 both" in shown


# ---------------------------------------------------------------- formats and parts

W = TensorScheme(format="int4", granularity=PerChannel(0))
A = TensorScheme(format="uint8", symmetric=False)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (OpConfig(weight=W, inputs=A), [("weights", 4), ("inputs", 8), ("both", 4)]),
        (OpConfig(weight=W), [("weights", 4)]),
        (OpConfig(inputs=(A,)), [("inputs", 8)]),
        (OpConfig(weight=W, output=A), [("weights", 4), ("inputs", 8), ("both", 4)]),
    ],
)
def test_parts_that_would_repeat_another_are_left_out(
    config: OpConfig, rows: list[tuple[str, int]]
) -> None:
    result = quantization.sweep(mlp(), [X], agreement, [("mine", config)], progress=False)
    assert [(row.part, row.bits) for row in result.rows] == rows


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no module": (ModelError, "must be a torch.nn.Module", {"model": len}),
    "no ops": (SpaceError, "nothing in this model", {"model": nn.ReLU()}),
    "no data": (DataError, "is empty", {"calib_dataloader": []}),
    "a number": (DataError, "is a int", {"calib_dataloader": 3}),
    "eval_func": (TunerError, "eval_func is a float: give a function", {"eval_func": 0.5}),
    "forward": (TunerError, "forward is a int", {"forward": 3}),
    "goal": (TunerError, "goal is a float: give an AccuracyGoal", {"goal": 0.01}),
    "one format": (TunerError, "formats is 'int8': give a list", {"formats": "int8"}),
    "no formats": (TunerError, "formats is empty", {"formats": []}),
    "unknown": (UnknownNameError, "unknown format 'int99'", {"formats": ["int99"]}),
    "a width": (TunerError, "formats holds 8: give the name", {"formats": [8]}),
    "twice": (TunerError, "'int8' twice", {"formats": ["int8", TensorScheme(format="int8")]}),
    "float": (TunerError, "quantizes nothing", {"formats": [("mine", OpConfig.float())]}),
    "parts": (TunerError, "parts is .*choose from 'weights'", {"parts": ["weight"]}),
    "no parts": (TunerError, "choose from", {"parts": []}),
    "parts None": (TunerError, "parts is None: choose from", {"parts": None}),
    "nothing left": (
        TunerError,
        "schemes for other parts only",
        {"formats": [("mine", OpConfig(inputs=A))], "parts": ["weights"]},
    ),
    "a name of two lines": (
        TunerError,
        "one line of printable text",
        {"formats": [("a\nb", OpConfig(inputs=A))]},
    ),
    "a number as name": (TunerError, "with the name 4", {"formats": [(4, OpConfig(inputs=A))]}),
    "confidence": (UnsupportedError, "confidence", {"goal": AccuracyGoal(confidence=0.9)}),
    "samples": (TunerError, "calib_samples is -1: give 1 or more", {"calib_samples": -1}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named(case: str) -> None:
    kind, says, arguments = REFUSED[case]
    usual = {"model": mlp(), "calib_dataloader": [X], "eval_func": agreement}
    with pytest.raises(kind, match=says):
        quantization.sweep(**{**usual, **arguments}, progress=False)
