"""The table of formats: names, systematic names, and formats of one's own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.contracts.references import PATHS, take_path
from tuner import formats
from tuner.errors import DataError, TunerError, UnknownNameError
from tuner.granularity import PerChannel
from tuner.kernels import codecs
from tuner.qparams import QParams, compute_qparams, dequantize, fake_quantize, quantize
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what a test registers."""
    monkeypatch.setattr(formats, "_TABLE", dict(formats._TABLE))
    monkeypatch.setattr(codecs, "_KNOWN", dict(codecs._KNOWN))


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take_path(request.param, monkeypatch)
    return str(request.param)


PROMISED = [
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 17)),
    *("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m4", "e3m2", "e2m3", "e2m1", "e4m3b11fnuz"),
    *("fp16", "bf16", "fp32", "nvfp4", "nf4", "mxint8"),
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4"),
    *(f"abfp{bits}" for bits in range(2, 9)),
]


def test_names_are_all_there() -> None:
    assert set(PROMISED) <= set(formats.names())
    for name in formats.names():
        assert formats.get(name).name == name
        assert TensorScheme(format=name).bits >= 2


NEAR = {
    "e4m3fm": "e4m3fn",
    "int99": "int9",
    "mxfp8": "mxfp8_e4m3",
    "nvpf4": "nvfp4",
    "float16": "fp16",
    "q": "Known: ",
    "e9m3": "e4m3",
    "e4m11": "e4m3",
    "e4m3fn_fast": "e4m3fn",
    "abfp17": "abfp",
    "abfp4_n0": "abfp4_n128",
}


@pytest.mark.parametrize(("name", "near"), NEAR.items())
def test_an_unknown_name_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near) as caught:
        formats.get(name)
    assert repr(name) in str(caught.value)
    with pytest.raises(ValidationError, match=near):
        TensorScheme(format=name)
    with pytest.raises(ValidationError, match=near):
        TensorScheme(format="e4m3fn", backward_format=name)


@pytest.mark.parametrize("name", ["e1m0", "e4m3b200"])
def test_a_systematic_name_without_numbers(name: str) -> None:
    with pytest.raises(TunerError, match=name.partition("b")[0]):
        formats.get(name)
    with pytest.raises((ValidationError, TunerError), match=name.partition("b")[0]):
        TensorScheme(format=name)


SPELLED = {
    # name: bits, largest, scaled, block size
    "e3m3": (7, 15.0, True, None),
    "e3m3fn": (7, 30.0, True, None),
    "e3m4fn": (8, 30.0, True, None),
    "e3m3_nosub_overflow": (7, 15.0, True, None),
    "e5m10_unscaled": (16, 65504.0, False, None),
    "e4m3b8fn": (8, 224.0, True, None),
    "abfp5_n48": (5, 15.0, True, 48),
    "abfp12": (12, 2047.0, True, 64),
}


@pytest.mark.parametrize(("name", "expected"), SPELLED.items())
def test_systematic_names(name: str, expected: tuple[int, float, bool, int | None]) -> None:
    fmt = formats.get(name)
    size = None if fmt.block is None else fmt.block.size
    assert (fmt.bits, fmt.largest, fmt.scaled, size) == expected
    assert name not in formats.names()
    assert formats.get(name) == fmt
    assert TensorScheme.model_validate_json(TensorScheme(format=name).model_dump_json()).bits


INTEGERS_ONLY = {
    "symmetric": False,
    "narrow": True,
    "reduce_range": True,
    "quant_min": -3,
    "quant_max": 3,
}
NO_CODES = ["e4m3fn", "fp16", "mxfp8_e4m3", "mxint8", "abfp8", "nf4", "nvfp4"]


@pytest.mark.parametrize("name", NO_CODES)
@pytest.mark.parametrize(("field", "value"), INTEGERS_ONLY.items())
def test_integer_fields_are_refused_elsewhere(name: str, field: str, value: object) -> None:
    message = f"{name} has no zero point and no range of codes: leave {field} at .*got {value}"
    with pytest.raises(ValidationError, match=message):
        TensorScheme.model_validate({"format": name, field: value})


@pytest.mark.parametrize("name", ["int8", "e4m3fn", "nvfp4", "nf4", "abfp4"])
def test_scale_rounding_is_for_mx(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} has no E8M0 scale to round.*got 'even'"):
        TensorScheme(format=name, scale_rounding="even")


@pytest.mark.parametrize("fields", [{"calibration": "mse"}, {"power_of_two_scale": True}])
def test_blocks_need_no_calibration(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="takes the scale of a block from its largest"):
        TensorScheme.model_validate({"format": "mxfp4", **fields})


def doubled(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 2


BAD_REGISTRATIONS = {
    "neither": ({}, "either a codebook or a forward"),
    "both": ({"codebook": [0, 1], "forward": torch.round}, "either a codebook or a forward"),
    "one entry": ({"codebook": [1.0, 1.0]}, "2 to 65536 different numbers in fp32, got 1"),
    "no entry": ({"codebook": []}, "2 to 65536 different numbers in fp32, got 0"),
    "many": ({"codebook": range(2**16 + 1)}, "2 to 65536 different numbers in fp32, got 65537"),
    "inf entry": ({"codebook": [0, float("inf")]}, "finite"),
    "nan entry": ({"codebook": [0, 1, float("nan")]}, "finite"),
    "beyond fp32": ({"codebook": [0, 1e39]}, "fp32"),
    "one in fp32": ({"codebook": [1, 1 + 2**-30]}, "different"),
    "only zero": ({"codebook": [0.0, 1e-50]}, "different"),
    "few bits": ({"codebook": range(17), "bits": 4}, "17 entries need 5 bits"),
    "no bits": ({"codebook": [0, 1], "bits": 0}, "above 0"),
    "no block": ({"codebook": [0, 1], "block_size": 0}, "above 0"),
    "largest": ({"forward": torch.round, "largest": 0.0}, "above 0"),
    "no backward": ({"forward": torch.round, "backward": 3}, "callable"),
    "infinite largest": ({"forward": torch.round, "largest": float("inf")}, "above 0"),
    "nan largest": ({"forward": torch.round, "largest": float("nan")}, "above 0"),
    "codebook and largest": ({"codebook": [0, 1], "largest": 2.0}, "only for a forward"),
    "codebook and backward": ({"codebook": [0, 1], "backward": doubled}, "only for a forward"),
    "no function": ({"forward": 3}, "callable"),
}


@pytest.mark.parametrize("case", BAD_REGISTRATIONS)
def test_bad_registrations(case: str) -> None:
    arguments, message = BAD_REGISTRATIONS[case]
    with pytest.raises(TunerError, match=message) as caught:
        formats.register("mine", **arguments)
    assert "'mine'" in str(caught.value)
    assert "mine" not in formats.names()


@pytest.mark.parametrize("name", ["int8", "e4m3fn", "e3m3", "abfp4_n32", "nf4"])
def test_a_name_is_taken_once(name: str) -> None:
    with pytest.raises(TunerError, match=f"'{name}' exists already"):
        formats.register(name, codebook=[0.0, 1.0])
    assert formats.get(name).kind in ("int", "float", "codebook")


def test_registering_the_same_again_is_harmless() -> None:
    first = formats.register("mine", codebook=[1, 0, -1, 0.5])
    assert formats.register("mine", codebook=[-1, 0, 0.5, 1]) == first
    with pytest.raises(TunerError, match="'mine' exists already"):
        formats.register("mine", codebook=[-1, 0, 1])


class TestCodebook:
    entries = (-2.0, -0.7, 0.1, 0.3, 1.0, 3.0)

    @pytest.fixture(autouse=True)
    def _register(self) -> None:
        formats.register("mine", codebook=self.entries)

    def test_bits(self) -> None:
        assert formats.get("mine").bits == 3
        assert formats.register("other", codebook=self.entries, bits=7).bits == 7

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_nearest_entry(self, dtype: torch.dtype, path: str) -> None:
        entries = torch.tensor(self.entries).double()  # as fp32 has them
        between = (entries[1:] + entries[:-1]) / 2
        ties = between.to(dtype)
        inf = torch.tensor(torch.inf, dtype=dtype)
        x = torch.cat([entries.to(dtype), ties, ties.nextafter(inf), ties.nextafter(-inf)])
        x = torch.cat([x, torch.randn(3000, dtype=dtype) * 2, torch.tensor([inf, -inf, -0.0])])
        scheme = TensorScheme(format="mine")
        y = fake_quantize(x, scheme, QParams(1.0))
        distance = (x.double().unsqueeze(1).clamp(-9, 9) - entries).abs()
        expected = entries[distance.argmin(1)].to(dtype)  # argmin: the first, hence the lower one
        assert torch.equal(y, expected)
        codes = quantize(x, scheme, QParams(1.0))
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.long(), distance.argmin(1))
        assert torch.equal(dequantize(codes, scheme, QParams(1.0)), expected.float())

    def test_neighbours_in_fp32(self) -> None:
        """The midpoint of two neighbours is no fp32 number: it must not be rounded up."""
        entries = [1 + k * 2.0**-23 for k in range(9)]
        formats.register("fine", codebook=entries)
        x = torch.tensor(entries)
        assert torch.equal(fake_quantize(x, TensorScheme(format="fine"), QParams(1.0)), x)

    def test_nan(self, path: str) -> None:
        x = torch.tensor([1.0, torch.nan])
        scheme = TensorScheme(format="mine")
        assert fake_quantize(x, scheme, QParams(1.0)).isnan().tolist() == [False, True]
        with pytest.raises(DataError, match="NaN"):
            quantize(x, scheme, QParams(1.0))

    def test_the_scale_takes_the_largest_to_the_largest(self, path: str) -> None:
        scheme = TensorScheme(format="mine", granularity=PerChannel(0))
        x = torch.tensor([[6.0, 2.0, -1.0], [-1.5, 0.5, 0.2]])
        qparams = compute_qparams(x, scheme)
        assert torch.equal(torch.as_tensor(qparams.scale), torch.tensor([2.0, 0.5]))
        nearest = torch.tensor([[3.0, 1.0, -0.7], [-2.0, 1.0, 0.3]])
        assert torch.equal(fake_quantize(x, scheme), nearest * torch.tensor([[2.0], [0.5]]))

    def test_gradient(self, path: str) -> None:
        x = torch.tensor([-2.1, -2.0, 0.0, 3.0, 3.1], requires_grad=True)
        fake_quantize(x, TensorScheme(format="mine"), QParams(1.0)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 1, 1, 1, 0]

    def test_gradient_of_positive_entries(self, path: str) -> None:
        formats.register("above", codebook=[1.0, 2.0, 3.0])
        x = torch.tensor([0.5, 1.0, 2.5, 3.0, 3.5], requires_grad=True)
        fake_quantize(x, TensorScheme(format="above"), QParams(1.0)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 1, 1, 1, 0]

    def test_in_blocks(self, path: str) -> None:
        formats.register("blocks", codebook=[-1, -0.5, 0, 0.5, 1], block_size=4)
        x = torch.randn(3, 10)
        y = fake_quantize(x, TensorScheme(format="blocks"))
        for start in (0, 4, 8):
            block = x[:, start : start + 4]
            amax = block.abs().amax(1, keepdim=True)
            steps = (block / amax * 2).numpy()
            expected = torch.from_numpy(np.ceil(steps - 0.5) / 2 + 0.0) * amax  # ties go down
            assert torch.equal(y[:, start : start + 4], expected)


class TestFunction:
    @pytest.mark.parametrize("shape", [(5,), (0,), (), (600, 700), (2, 3, 5)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_forward_alone(self, shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
        formats.register("mine", forward=lambda v: (v * 4).trunc() / 4)
        x = torch.randn(shape).to(dtype)
        y = fake_quantize(x, TensorScheme(format="mine"))
        assert torch.equal(y, (x.to(torch.float64) * 4).trunc().div(4).to(dtype))
        assert y.dtype == dtype

    def test_the_gradient_passes_as_it_is(self, path: str) -> None:
        formats.register("mine", forward=torch.sign)
        x = torch.tensor([-30.0, 0.2, 30.0], requires_grad=True)
        upstream = torch.tensor([1.0, 2.0, 3.0])
        fake_quantize(x, TensorScheme(format="mine")).backward(upstream)
        assert torch.equal(torch.as_tensor(x.grad), upstream)

    def test_forward_and_backward(self, path: str) -> None:
        formats.register("mine", forward=torch.sign, backward=doubled)
        x = torch.tensor([-3.0, 0.2], requires_grad=True)
        y = fake_quantize(x, TensorScheme(format="mine"))
        y.backward(torch.tensor([1.0, 2.0]))
        assert y.tolist() == [-1, 1]
        assert torch.as_tensor(x.grad).tolist() == [2, 4]
        quantizer = Quantizer(TensorScheme(format="mine"))
        quantizer(x).sum().backward()
        assert torch.as_tensor(x.grad).tolist() == [4, 6]

    def test_scaled_to_its_largest(self, path: str) -> None:
        formats.register("mine", forward=torch.round, largest=10.0)
        x = torch.tensor([-40.0, 13.0, 2.5])
        assert fake_quantize(x, TensorScheme(format="mine")).tolist() == [-40, 12, 4]

    def test_in_blocks(self, path: str) -> None:
        formats.register("mine", forward=torch.round, largest=2.0, block_size=2)
        x = torch.tensor([4.0, 1.5, 0.5, 0.2, -8.0])
        assert fake_quantize(x, TensorScheme(format="mine")).tolist() == [4, 2, 0.5, 0.25, -8]

    def test_the_input_stays(self, path: str) -> None:
        formats.register("mine", forward=lambda v: v.zero_())
        x = torch.ones(4)
        assert fake_quantize(x, TensorScheme(format="mine")).tolist() == [0, 0, 0, 0]
        assert x.tolist() == [1, 1, 1, 1]

    def test_it_has_no_codes(self) -> None:
        formats.register("mine", forward=torch.round)
        assert not formats.get("mine").has_codes
        with pytest.raises(DataError, match=r"'mine' is a function: it has no codes"):
            quantize(torch.ones(2), TensorScheme(format="mine"), QParams(1.0))
        with pytest.raises(DataError, match=r"'mine' is a function: it has no codes"):
            dequantize(torch.ones(2).int(), TensorScheme(format="mine"), QParams(1.0))

    @pytest.mark.parametrize("result", [None, 3.0, torch.ones(7)], ids=str)
    def test_what_it_returns_is_checked(self, result: object) -> None:
        formats.register("mine", forward=lambda v: result)
        with pytest.raises(DataError, match="forward function of format 'mine' returned"):
            fake_quantize(torch.ones(2), TensorScheme(format="mine"))

    def test_its_own_errors_pass(self) -> None:
        def broken(v: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("mine")

        formats.register("mine", forward=broken)
        with pytest.raises(ZeroDivisionError, match="mine"):
            fake_quantize(torch.ones(2), TensorScheme(format="mine"))


_PLAN = """
import sys, torch, tuner
if sys.argv[1] == "register":
    tuner.formats.register("mine", codebook=[-1.0, 0.0, 1.0])
try:
    plan = tuner.Plan.from_json(sys.stdin.read())
except tuner.TunerError as error:
    print("refused:", error)
else:
    y = tuner.fake_quantize(torch.tensor([2.0, -0.2]), plan["fc"].weight)
    print("loaded:", plan["fc"].weight.format, y.tolist())
"""


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("register", "loaded: mine [2.0, 0.0]"), ("forget", "unknown format 'mine'")],
)
def test_a_plan_with_a_format_of_ones_own(mode: str, expected: str) -> None:
    weight = {"format": "mine"}
    plan = json.dumps({"version": 1, "ops": {"fc": {"weight": weight, "inputs": None}}})
    command = [sys.executable, "-c", _PLAN, mode]
    done = subprocess.run(command, input=plan, capture_output=True, text=True, check=False)
    assert expected in done.stdout, done.stderr
