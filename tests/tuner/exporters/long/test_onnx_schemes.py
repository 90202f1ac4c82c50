"""What ONNX Runtime computes without optimizing is the simulation, whatever the scheme.

The schemes are tried together, each on a layer of its own: an export takes seconds.
"""

from collections import Counter

import pytest
import torch
from torch import nn

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
from tuner.errors import ExportError

ROUNDING = 1e-5
CODES = {  # what the constants of a weight are stored as, under each scheme
    "int8": (OpConfig(weight=W8, inputs=A8), "INT8"),
    "signed": (OpConfig(weight=scheme("int8"), inputs=scheme("int8")), "INT8"),
    "uint8_weight": (
        OpConfig(weight=scheme("uint8", PerChannel(0), symmetric=False), inputs=A8),
        "INT8",
    ),
    "int16": (OpConfig(weight=W8, inputs=scheme("int16")), "INT8"),
    "uint16": (OpConfig(weight=W8, inputs=scheme("uint16", symmetric=False)), "INT8"),
    "weight16": (OpConfig(weight=scheme("int16", PerChannel(0)), inputs=A8), "INT16"),
    "w6a6": (
        OpConfig(weight=scheme("int6", PerChannel(0)), inputs=scheme("uint6", symmetric=False)),
        "INT8",
    ),
    "w4a4": (
        OpConfig(weight=scheme("int4", PerChannel(0)), inputs=scheme("uint4", symmetric=False)),
        "INT4",
    ),
    "w2a3": (OpConfig(weight=scheme("int2", PerChannel(0)), inputs=scheme("int3")), "INT4"),
    "dynamic": (
        OpConfig(weight=W8, inputs=scheme("int8", PerToken(), dynamic=True)),
        "INT8",
    ),
    "dynamic_affine": (
        OpConfig(weight=W8, inputs=scheme("uint8", symmetric=False, dynamic=True)),
        "INT8",
    ),
    "channels": (OpConfig(weight=W8, inputs=scheme("int8", PerChannel(-1))), "INT8"),
    "power_of_two": (
        OpConfig(
            weight=scheme("int8", power_of_two_scale=True),
            inputs=scheme("uint8", symmetric=False, power_of_two_scale=True),
        ),
        "INT8",
    ),
    "narrow": (
        OpConfig(weight=scheme("int8", narrow=True), inputs=scheme("int8", narrow=True)),
        "INT8",
    ),
    "reduced": (
        OpConfig(weight=W8, inputs=scheme("uint8", symmetric=False, reduce_range=True)),
        "INT8",
    ),
    "bias": (OpConfig(weight=W8, inputs=A8, bias=scheme("int32")), "INT8"),
    "output": (OpConfig(weight=W8, inputs=A8, output=A8), "INT8"),
    "fp8": (
        OpConfig(weight=scheme("e4m3fn", PerChannel(0)), inputs=scheme("e4m3fn")),
        "FLOAT8E4M3FN",
    ),
    "e5m2": (OpConfig(weight=scheme("e5m2", PerChannel(0)), inputs=scheme("e5m2")), "FLOAT8E5M2"),
    "fp8_int8": (OpConfig(weight=scheme("e4m3fn", PerChannel(0)), inputs=A8), "FLOAT8E4M3FN"),
    "fp16_input": (OpConfig(weight=W8, inputs=scheme("fp16")), "INT8"),
    "bf16_input": (OpConfig(weight=W8, inputs=scheme("bf16")), "INT8"),
    "groups": (OpConfig(weight=scheme("int4", PerGroup(16, -1))), "INT4"),
    "groups8": (OpConfig(weight=scheme("int8", PerGroup(16, -1))), "INT8"),
    "ragged": (OpConfig(weight=scheme("int4", PerGroup(36, -1))), "INT4"),
    "ragged_shared": (OpConfig(weight=scheme("int4", PerGroup(32, -1))), "INT4"),
    "long_groups": (OpConfig(weight=scheme("int4", PerGroup(128, -1))), "INT4"),
    "int4_channels": (OpConfig(weight=scheme("int4", PerChannel(0))), "INT4"),
    "int4_tensor": (OpConfig(weight=scheme("int4")), "INT4"),
    "uint4": (OpConfig(weight=scheme("uint4", PerChannel(0), symmetric=False)), "INT4"),
    "groups_static": (OpConfig(weight=scheme("int8", PerGroup(16, -1)), inputs=A8), "INT8"),
    "across": (OpConfig(weight=scheme("int8", PerChannel(1)), inputs=A8), "INT8"),
}
MATRICES = (
    "int8",
    "signed",
    "w4a4",
    "weight16",
    "output",
    "fp8",
    "fp8_int8",
    "groups",
    "int4_channels",
    "groups_static",
    "across",
)
FLOATS = {name: OpConfig(weight=scheme(name)) for name in ("mxfp4", "nf4", "e3m2")}


SCHEMES = {f"{name}.0": config for name, (config, _) in CODES.items()} | {
    f"{name}.0": config for name, config in FLOATS.items()
}


@pytest.fixture(scope="module")
def layers() -> Exported:
    torch.manual_seed(0)
    branches = {name: nn.Sequential(nn.Linear(48, 48), nn.ReLU()) for name in (*CODES, *FLOATS)}
    space = only(SCHEMES)
    return exported(Branches(**branches), floats(3, 5, 48), space)


@pytest.fixture(scope="module")
def matrices() -> Exported:
    torch.manual_seed(0)
    branches = {name: nn.Sequential(nn.Linear(48, 48), nn.ReLU()) for name in MATRICES}
    space = only({f"{name}.0": CODES[name][0] for name in MATRICES})
    return exported(Branches(**branches), floats(7, 48), space)


@pytest.mark.parametrize("name", [*CODES, *FLOATS])
def test_onnx_runtime_gives_what_is_simulated(layers: Exported, name: str) -> None:
    _check(layers, name)


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_computed_as_batches_are(matrices: Exported, name: str) -> None:
    _check(matrices, name)
    assert not matrices.kernels() & Counter(("Gemm", "FusedGemm", "QGemm"))


def _check(model: Exported, name: str) -> None:
    assert _worst(model, name, optimized=False) < ROUNDING
    # nothing is between a quantizer and an output that could make differences grow
    assert _worst(model, name, optimized=True) < (1 / 200 if name == "output" else ROUNDING)


def _worst(model: Exported, name: str, optimized: bool) -> float:
    kept = model.__dict__.setdefault("kept", {})
    if optimized not in kept:
        kept[optimized] = model.worst(optimized)
    found: float = kept[optimized][name]
    return found


@pytest.mark.parametrize("name", CODES)
def test_weights_are_stored_as_codes(layers: Exported, name: str) -> None:
    types = layers.types()
    kept = {t for constant, t in types.items() if constant.startswith(f"{name}_0_weight_codes")}
    assert kept == {CODES[name][1]}
    assert f"model.{name}.0.weight" not in types


def test_what_onnx_cannot_hold_stays_float_with_a_reason(layers: Exported) -> None:
    left = {entry.op: entry.reason for entry in layers.graph.left_float}
    assert set(left) == {f"{name}.0" for name in FLOATS}
    assert "ONNX has no nf4" in left["nf4.0"]
    assert not any("nf4_0_weight_codes" in name for name in layers.types())


def test_quantized_tensors_agree_one_by_one(layers: Exported) -> None:
    found = layers.layers()
    inner = [layer for layer in found if layer.name not in layers.traced.outputs]
    assert len(inner) == 10  # equal quantizers of the one input became one
    assert max(layer.max_steps for layer in found) <= 1
    assert min(layer.equal for layer in inner) > 0.99


@pytest.mark.parametrize(
    ("scheme_", "why"),
    [
        (scheme("mxfp8_e4m3"), "layer, input 0: ONNX has no mxfp8_e4m3"),
        (scheme("int32"), "layer, input 0: ONNX quantizes to 16 bits at most"),
        (scheme("e4m3fn", dynamic=True), "e4m3fn is spelled with static scales only"),
    ],
)
def test_activations_that_onnx_cannot_say_are_refused(scheme_: object, why: str) -> None:
    config = OpConfig(weight=W8, inputs=scheme_)
    with pytest.raises(ExportError, match=why):
        exported(Branches(layer=nn.Linear(8, 8)), floats(4, 8), only({"layer": config}))


def test_halves_are_stored_as_halves() -> None:
    halves = {name: OpConfig(weight=scheme(name)) for name in ("fp16", "bf16")}
    branches = {name: nn.Conv1d(5, 40, 3) for name in halves}
    model = exported(Branches(**branches), floats(3, 5, 16), only(halves))
    types = model.types()
    assert types["fp16_weight_fp16_codes"] == "FLOAT16"
    assert types["bf16_weight_bf16_codes"] == "BFLOAT16"
    assert not any(name.endswith(".weight") for name in types)
    assert max(model.worst().values()) < ROUNDING
    assert max(model.worst(optimized=True).values()) < ROUNDING


def test_values_may_be_clipped_in_the_place_of_codes() -> None:
    config = CODES["w4a4"][0]
    model = exported(
        Branches(layer=nn.Linear(48, 8)), floats(6, 48), only({"layer": config}), clips_values=True
    )
    order = [node.op_type for node in model.proto.node]
    assert order.index("Clip") < order.index("QuantizeLinear")
    assert model.worst()["layer"] < ROUNDING
