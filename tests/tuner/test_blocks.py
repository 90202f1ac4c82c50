"""Block formats against torchao, and against the texts that define them, in numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.contracts.references import (
    ML_FORMATS,
    PATHS,
    Floats,
    assert_same_bits,
    take_path,
)
from tuner.errors import SchemeError, TunerError
from tuner.granularity import PerChannel
from tuner.qparams import QParams, compute_qparams, dequantize, fake_quantize, quantize
from tuner.schemes import TensorScheme

ROUNDINGS = ("floor", "ceil", "rceil", "even")
ELEMENTS = {  # MX format: element, exponent of its largest number, mantissa bits
    "mxfp8_e4m3": ("e4m3fn", 8, 3),
    "mxfp8_e5m2": ("e5m2", 15, 2),
    "mxfp6_e2m3": ("e2m3", 2, 3),
    "mxfp6_e3m2": ("e3m2", 4, 2),
    "mxfp4": ("e2m1", 2, 1),
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take_path(request.param, monkeypatch)
    return str(request.param)


def mx(name: str, rounding: str = "floor") -> TensorScheme:
    return TensorScheme.model_validate({"format": name, "scale_rounding": rounding})


def rows(exponents: range, seed: int = 0) -> Floats:
    """Return blocks of 32 with a largest magnitude at, just below and just above powers of two."""
    rng = np.random.default_rng(seed)
    found = []
    for exponent in exponents:
        power = np.float32(math.ldexp(1.0, exponent))
        near = [power, np.nextafter(power, np.float32(0)), np.nextafter(power, np.float32(np.inf))]
        near += [power * np.float32(f) for f in (1.25, 1.5, 1.74, 1.75, 1.76, 1.875, 1.9375, 1.99)]
        for amax in near:
            block = rng.uniform(-1, 1, 32).astype(np.float32) * np.float32(amax)
            block[rng.integers(0, 32)] = amax * rng.choice([-1, 1])
            block[:3] = 0.0, -0.0, amax * np.float32(2.0**-12)
            found.append(block)
    return np.stack(found)


def random_rows(seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(600, 64)) * np.exp2(rng.uniform(-30, 30, (600, 1)))).astype("f4")


def shared_exponent(amax: float, name: str, rounding: str) -> int:
    """Return the unbiased E8M0 exponent by exact arithmetic on the largest magnitude."""
    if name == "mxint8":
        emax, mantissa, largest = 0, 6, 127 / 64
    else:
        element, emax, mantissa = ELEMENTS[name]
        largest = ML_FORMATS[element].largest
    if amax == 0:
        return -127
    if rounding == "rceil":
        amax = float(np.float32(amax) / np.float32(largest))  # as hardware has it, in fp32
        if amax == 0:
            return -127
    fraction, exponent = math.frexp(amax)  # 0.5 <= fraction < 1
    if rounding == "even" and fraction * 2 >= 2 - 2.0 ** -(mantissa + 1):
        exponent += 1
    if rounding in ("ceil", "rceil") and fraction > 0.5:
        exponent += 1
    exponent -= 1
    return max(-127, min(127, exponent if rounding == "rceil" else exponent - emax))


def mx_by_definition(x: Floats, name: str, rounding: str) -> Floats:
    """Return OCP Microscaling v1.0, section 6.3, block by block of the last axis."""
    out = np.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start : start + 32].astype(np.float64)
            amax = np.abs(block).max()
            if not np.isfinite(amax):
                out[row, start : start + 32] = np.nan
                continue
            scale = 2.0 ** shared_exponent(float(amax), name, rounding)
            if name == "mxint8":
                levels = np.clip(np.rint(block / scale * 64), -127, 127) / 64
            else:
                small = np.array(block / scale, dtype=np.float32)
                levels = ML_FORMATS[ELEMENTS[name][0]].round(small).astype(np.float64)
            with np.errstate(over="ignore"):
                out[row, start : start + 32] = (levels * scale).astype(np.float32)
    return out


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*ELEMENTS, "mxint8"])
class TestMxByDefinition:
    def test_every_magnitude(self, name: str, rounding: str, path: str) -> None:
        x = np.concatenate([rows(range(-149, 127, 3)), rows(range(-3, 9)), rows(range(120, 128))])
        x = x[np.isfinite(x).all(1)]
        ours = fake_quantize(torch.from_numpy(x), mx(name, rounding))
        assert_same_bits(ours, mx_by_definition(x, name, rounding), x)

    @pytest.mark.parametrize("length", [1, 31, 33, 45, 64, 70])
    def test_ragged_blocks(self, name: str, rounding: str, length: int, path: str) -> None:
        x = random_rows()[:40, :length].copy()
        ours = fake_quantize(torch.from_numpy(x), mx(name, rounding))
        assert_same_bits(ours, mx_by_definition(x, name, rounding), x)

    def test_nan_and_inf_spoil_their_block_alone(self, name: str, rounding: str, path: str) -> None:
        x = random_rows()[:6].copy()
        x[0, 5], x[1, 40], x[2, 63], x[3, 0] = np.nan, np.inf, -np.inf, -np.nan
        x[4, :32] = 0.0
        x[4, 3] = -0.0
        ours = fake_quantize(torch.from_numpy(x), mx(name, rounding))
        assert_same_bits(ours, mx_by_definition(x, name, rounding), x)
        assert ours.isnan().sum() == 4 * 32
        assert ours[4, :32].tolist() == [0.0] * 32

    def test_codes(self, name: str, rounding: str) -> None:
        x = torch.from_numpy(random_rows()[:, :50].copy())
        scheme = mx(name, rounding)
        qparams = compute_qparams(x, scheme)
        codes = quantize(x, scheme, qparams)
        assert torch.equal(dequantize(codes, scheme, qparams), fake_quantize(x, scheme))
        assert torch.equal(fake_quantize(x, scheme, qparams), fake_quantize(x, scheme))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, name: str, rounding: str, dtype: torch.dtype, path: str) -> None:
        x = torch.from_numpy(random_rows()).clamp(-60000, 60000).to(dtype)
        wide = fake_quantize(x.float(), mx(name, rounding))
        largest = torch.finfo(dtype).max
        ours = fake_quantize(x, mx(name, rounding))
        assert ours.dtype == dtype
        assert torch.equal(ours, wide.clamp(-largest, largest).to(dtype))


def test_scales_have_the_shape_of_the_blocks() -> None:
    qparams = compute_qparams(torch.randn(3, 5, 70), mx("mxfp4"))
    assert torch.as_tensor(qparams.scale).shape == (3, 5, 3)


def test_granularity_says_nothing() -> None:
    x = torch.randn(4, 70)
    scheme = TensorScheme(format="mxfp4", granularity=PerChannel(0))
    assert torch.equal(fake_quantize(x, scheme), fake_quantize(x, mx("mxfp4")))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxint8", "nvfp4", "nf4", "abfp4"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 40), (), (1,), (2, 3, 40)])
def test_odd_shapes(name: str, shape: tuple[int, ...], path: str) -> None:
    x = torch.randn(shape)
    y = fake_quantize(x, TensorScheme(format=name))
    assert y.shape == x.shape
    assert bool(y.isfinite().all())
    if not shape:
        assert torch.equal(y, fake_quantize(x.reshape(1), TensorScheme(format=name)).reshape(()))


@pytest.mark.parametrize("name", ["mxfp8_e5m2", "mxint8", "nvfp4", "nf4", "abfp8"])
def test_layouts_in_memory(name: str, path: str) -> None:
    scheme = TensorScheme(format=name)
    x = torch.randn(2, 6, 5, 40)
    expected = fake_quantize(x, scheme)
    assert torch.equal(fake_quantize(x.to(memory_format=torch.channels_last), scheme), expected)
    assert torch.equal(fake_quantize(x.mT.contiguous().mT, scheme), expected)
    assert torch.equal(fake_quantize(x.repeat(1, 1, 1, 2)[..., :40], scheme), expected)
    assert torch.equal(fake_quantize(x.clone().requires_grad_(), scheme).detach(), expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*ELEMENTS, "mxint8"])
def test_mx_gradient(name: str, rounding: str, path: str) -> None:
    x = torch.from_numpy(random_rows()[:50]).requires_grad_()
    y = fake_quantize(x, mx(name, rounding))
    y.sum().backward()
    scale = torch.as_tensor(compute_qparams(x, mx(name, rounding)).scale)
    largest = 127 if name == "mxint8" else ML_FORMATS[ELEMENTS[name][0]].largest
    inside = (x.detach().unflatten(-1, (2, 32)) / scale.unsqueeze(-1)).abs() <= largest
    assert torch.equal(torch.as_tensor(x.grad), inside.flatten(-2).float())


# Where torchao leaves the OCP text. Name: blocks, rounding, why.
EXCEPTIONS: dict[str, tuple[Floats, str, str]] = {
    "smallest scale": (
        np.full((1, 32), 2.0**-130, dtype=np.float32),
        "floor",
        "it clamps the scale to the smallest normal fp32 number, 2^-126; OCP's smallest is 2^-127",
    ),
    "rceil logarithm": (
        np.array([[448.0 * 2.0**10 * (1 + 2.0**-23), *[2.0] * 31]], dtype=np.float32),
        "rceil",
        "log2 in fp32 rounds to a whole number just beside a power of two: the ceiling is too low",
    ),
    "rceil smallest": (
        np.full((1, 32), 2.0**-125, dtype=np.float32),
        "rceil",
        "it multiplies with 1 instead of 2^127 where the scale is 2^-127",
    ),
    "rceil infinity": (
        np.full((1, 32), np.inf, dtype=np.float32),
        "rceil",
        "inf gets the scale 2^127; OCP leaves inf in a block open, ours is NaN in every rounding",
    ),
}


class TestAgainstTorchao:
    """Bit for bit, but for the cases of EXCEPTIONS."""

    @pytest.fixture(autouse=True)
    def _torchao(self) -> None:
        reason = "torchao is not installed: block formats are not compared with it"
        self.tensor: Any = pytest.importorskip(
            "torchao.prototype.mx_formats.mx_tensor", reason=reason
        )
        self.nvfp4: Any = pytest.importorskip(
            "torchao.prototype.mx_formats.nvfp4_tensor", reason=reason
        )

    def theirs(self, x: Floats, name: str, rounding: str) -> Floats:
        element = {
            "mxfp8_e4m3": torch.float8_e4m3fn,
            "mxfp8_e5m2": torch.float8_e5m2,
            "mxfp6_e2m3": self.tensor.DTYPE_FP6_E2M3,
            "mxfp6_e3m2": self.tensor.DTYPE_FP6_E3M2,
            "mxfp4": torch.float4_e2m1fn_x2,
        }[name]
        mode = self.tensor.ScaleCalculationMode[rounding.upper()]
        scale, data = self.tensor.to_mx(torch.from_numpy(x), element, 32, scaling_mode=mode)
        return np.asarray(self.tensor.to_dtype(data, scale, element, 32, torch.float32).numpy())

    @pytest.mark.parametrize("rounding", ROUNDINGS)
    @pytest.mark.parametrize("name", ELEMENTS)
    def test_mx(self, name: str, rounding: str, path: str) -> None:
        element, emax, _ = ELEMENTS[name]
        x = np.concatenate([rows(range(emax - 120, 110, 2)), rows(range(-3, 9))])
        x = np.concatenate([x[len(x) % 2 :].reshape(-1, 64), random_rows()])
        if rounding == "rceil":
            ratio = np.abs(x.reshape(-1, 32)).max(1).astype("f4") / np.float32(
                ML_FORMATS[element].largest
            )
            exact = np.log2(ratio.astype(np.float64))
            beside = (exact != np.rint(exact)) & (np.abs(exact - np.rint(exact)) < 2.0**-16)
            assert beside.mean() < 0.3
            x = x.reshape(-1, 32)[~beside]
        ours = fake_quantize(torch.from_numpy(x), mx(name, rounding))
        assert_same_bits(ours, self.theirs(x, name, rounding), x)

    @pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4"])
    @pytest.mark.parametrize("rounding", ["floor", "ceil", "even"])
    def test_nan_makes_the_block_nan(self, name: str, rounding: str) -> None:
        x = random_rows()[:3].copy()
        x[1, 3] = np.nan
        ours = fake_quantize(torch.from_numpy(x), mx(name, rounding))
        assert_same_bits(ours, self.theirs(x, name, rounding), x)

    @pytest.mark.parametrize("case", EXCEPTIONS)
    def test_exceptions(self, case: str) -> None:
        x, rounding, why = EXCEPTIONS[case]
        ours = fake_quantize(torch.from_numpy(x), mx("mxfp8_e4m3", rounding))
        assert_same_bits(ours, mx_by_definition(x, "mxfp8_e4m3", rounding), x)
        theirs = self.theirs(x, "mxfp8_e4m3", rounding)
        assert not np.array_equal(ours.numpy(), theirs, equal_nan=True), f"no longer: {why}"

    def test_nvfp4(self, path: str) -> None:
        rng = np.random.default_rng(0)
        for seed in range(20):
            x = torch.from_numpy(random_rows(seed)[:32] * np.float32(2.0 ** rng.integers(-20, 20)))
            x = x.where(x.abs() < x.abs().max() / 2**10, x / 2**9)
            above = x.abs().max() / (448.0 * 6.0)
            scales, data = self.nvfp4.nvfp4_quantize(x, 16, above)
            codes = torch.stack([data & 0xF, data >> 4], -1).reshape(x.shape).to(torch.uint8)
            ours = compute_qparams(x, TensorScheme(format="nvfp4"))
            assert torch.equal(torch.as_tensor(ours.global_scale), above)
            assert torch.equal(torch.as_tensor(ours.scale), scales.float())
            our_codes = quantize(x, TensorScheme(format="nvfp4"), ours)
            assert torch.equal(our_codes, codes)


# NVIDIA, 'Introducing NVFP4': a global fp32 scale, an E4M3 scale for 16 values, E2M1 values
@pytest.mark.parametrize(("name", "smallest"), [("nvfp4", 2.0**-6), ("nvfp4_subnormal", 2.0**-9)])
class TestNvfp4:
    def expected(self, x: Floats, smallest: float) -> Floats:
        f4 = np.float32
        above = np.abs(x).max() / f4(448 * 6)
        blocks = x.reshape(*x.shape[:-1], -1, 16)
        amax = np.abs(blocks).max(-1, keepdims=True)
        ideal = np.clip(amax / f4(6) / above, f4(smallest), f4(448))
        scale = ML_FORMATS["e4m3fn"].round(ideal)
        levels = ML_FORMATS["e2m1"].round(blocks * (f4(1) / above / scale))
        return np.asarray(levels * (scale * above)).reshape(x.shape).astype(f4)

    def test_by_definition(self, name: str, smallest: float, path: str) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 64)).astype("f4")
        x *= np.exp2(rng.uniform(-16, 0, (40, 1))).astype("f4")
        ours = fake_quantize(torch.from_numpy(x), TensorScheme(format=name))
        assert_same_bits(ours, self.expected(x, smallest), x)

    def test_the_floor_of_the_scale(self, name: str, smallest: float) -> None:
        x = torch.ones(2, 16)
        x[1] = 2.0**-30
        scale = torch.as_tensor(compute_qparams(x, TensorScheme(format=name)).scale)
        assert scale.tolist() == [[448.0], [smallest]]

    @pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 1e-34, 1e-32, 1e-30, 1e30, 3.4e38])
    def test_extreme_magnitudes(self, name: str, smallest: float, amax: float, path: str) -> None:
        x = torch.zeros(3, 32)
        x[0] = torch.linspace(-1, 1, 32) * amax
        x[1, :3] = torch.tensor([amax / 1000, 0.0, -amax / 10])
        y = fake_quantize(x, TensorScheme(format=name))
        assert bool(y.isfinite().all())
        assert torch.equal(y[2], torch.zeros(32))
        if amax > 1e-33:
            assert float(y.max()) == pytest.approx(amax, rel=0.07)

    def test_non_finite_values_are_left_out(self, name: str, smallest: float, path: str) -> None:
        x = torch.randn(2, 32)
        x[0, 0], x[0, 20], x[1, 5] = torch.inf, -torch.inf, torch.nan
        y = fake_quantize(x, TensorScheme(format=name))
        assert y.isnan().nonzero().tolist() == [[1, 5]]
        assert bool(y[0].isfinite().all())
        clean = torch.where(x.isfinite(), x, 0.0)
        rest = x.isfinite()
        assert torch.equal(y[rest], fake_quantize(clean, TensorScheme(format=name))[rest])

    def test_ragged_blocks(self, name: str, smallest: float, path: str) -> None:
        x = torch.randn(3, 37)
        padded = torch.nn.functional.pad(x, (0, 11))
        scheme = TensorScheme(format=name)
        assert torch.equal(fake_quantize(x, scheme), fake_quantize(padded, scheme)[:, :37])

    def test_gradient(self, name: str, smallest: float, path: str) -> None:
        x = torch.randn(4, 32, requires_grad=True)
        fake_quantize(x, TensorScheme(format=name)).sum().backward()
        qparams = compute_qparams(x, TensorScheme(format=name))
        whole = torch.as_tensor(qparams.scale) * torch.as_tensor(qparams.global_scale)
        steps = x.detach().unflatten(-1, (2, 16)) / whole.unsqueeze(-1)
        clear = (steps.abs() / 6 - 1).abs() > 1e-5
        gradient = torch.as_tensor(x.grad).unflatten(-1, (2, 16))
        assert torch.equal(gradient[clear], (steps.abs() <= 6).float()[clear])


NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023
1.0"""  # Dettmers et al., QLoRA, appendix E


class TestNf4:
    def test_the_nearest_of_sixteen(self, path: str) -> None:
        table = np.array([float(entry) for entry in NF4.split()])
        x = random_rows()[:, :50].copy()
        x = np.concatenate([x, x * 3], 1)  # one block of 64, and one of 36
        ours = fake_quantize(torch.from_numpy(x), TensorScheme(format="nf4")).numpy()
        for start, stop in ((0, 64), (64, 100)):
            block = x[:, start:stop]
            scale = np.abs(block).max(1, keepdims=True)
            steps = (block / scale).astype(np.float64)
            nearest = table[np.abs(steps[..., None] - table).argmin(-1)].astype(np.float32)
            assert_same_bits(np.ascontiguousarray(ours[:, start:stop]), nearest * scale, block)

    def test_codes(self) -> None:
        scheme = TensorScheme(format="nf4")
        table = torch.tensor([float(entry) for entry in NF4.split()])
        qparams = compute_qparams(table, scheme)
        assert quantize(table, scheme, qparams).tolist() == list(range(16))
        assert torch.equal(dequantize(torch.arange(16), scheme, qparams), table)

    def test_zeros_stay(self, path: str) -> None:
        x = torch.zeros(2, 70)
        x[1, 66] = 3.0
        assert torch.equal(fake_quantize(x, TensorScheme(format="nf4")), x)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_abfp_by_definition(bits: int, size: int, path: str) -> None:
    """Basumallik et al. 2022, section III: bf16 scales, symmetric whole numbers."""
    name = f"abfp{bits}" if size == 64 else f"abfp{bits}_n{size}"
    x = np.concatenate([random_rows(seed) for seed in range(5)], 1)[:, :300].copy()
    ours = fake_quantize(torch.from_numpy(x), TensorScheme(format=name)).numpy()
    for start in range(0, 300, size):
        block = x[:, start : start + size]
        amax = ML_FORMATS["bf16"].round(np.abs(block).max(1, keepdims=True))
        scale = amax / np.float32(2 ** (bits - 1) - 1)
        most = 2 ** (bits - 1) - 1
        expected = np.clip(np.rint(block / scale), -most, most) * scale
        assert_same_bits(np.ascontiguousarray(ours[:, start : start + size]), expected, block)


BLOCKS = ["abfp2", "abfp8", "nf4", "nvfp4", "mxfp4", "mxfp8_e5m2", "mxint8"]


@pytest.mark.parametrize("amax", [3.4028234663852886e38, 1e-38, 1e-42, 1e-45])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_ends_of_fp32(name: str, amax: float, path: str) -> None:
    x = torch.tensor([amax, -amax, amax / 2, 0.0])
    y = fake_quantize(x, TensorScheme(format=name))
    assert bool(y.isfinite().all())
    assert y[3] == 0
    if amax > 1:
        assert y[0] >= amax * 0.6


@pytest.mark.parametrize("name", BLOCKS)
def test_double_precision(name: str) -> None:
    """Scales are fp32 numbers; values in float64 are rounded once."""
    scheme = TensorScheme(format=name)
    x = torch.randn(5, 100)
    narrow, wide = fake_quantize(x, scheme), fake_quantize(x.double(), scheme)
    assert wide.dtype == torch.float64
    same = torch.isclose(wide.float(), narrow, rtol=1e-6, atol=0.0)
    assert same.float().mean() > 0.99  # but for ties of one that are none of the other
    scale = torch.as_tensor(compute_qparams(x, scheme).scale)
    assert torch.equal(torch.as_tensor(compute_qparams(x.double(), scheme).scale), scale)


def test_what_is_no_block_format() -> None:
    from tuner.blocks import block_qparams

    with pytest.raises(TunerError, match="int8 is no block format"):
        block_qparams(torch.ones(3), TensorScheme(format="int8"))


@pytest.mark.parametrize("name", ["nf4", "abfp4", "nvfp4", "e4m3fn"])
def test_a_scale_of_nan_is_for_mx(name: str) -> None:
    scale = torch.tensor([float("nan")])
    with pytest.raises(SchemeError, match="finite number above 0"):
        fake_quantize(torch.ones(4), TensorScheme(format=name), QParams(scale))
    y = fake_quantize(torch.ones(4), mx("mxfp4"), QParams(scale))
    assert bool(y.isnan().all())
