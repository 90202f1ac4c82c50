"""Every float format against ml_dtypes, torch, gfloat, and lists of its numbers."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.contracts.references import (
    ML_FORMATS,
    PATHS,
    TORCH_FORMATS,
    Enumerated,
    Floats,
    adversarial,
    assert_same_bits,
    random_bits,
    random_near,
    take_path,
)
from tuner import formats
from tuner.errors import DataError, TunerError
from tuner.qparams import QParams, dequantize, fake_quantize, quantize
from tuner.schemes import TensorScheme

INPUTS = 220_000


def unscaled(name: str, x: Floats) -> torch.Tensor:
    return fake_quantize(torch.from_numpy(x), TensorScheme(format=name), QParams(scale=1.0))


def inputs_of(name: str) -> Floats:
    """Return at least 200,000 inputs, half of them around every number of the format."""
    values = ML_FORMATS[name].values()
    numbers = np.unique(np.abs(values[np.isfinite(values)].astype(np.float64)))
    beyond = 2 * numbers[-1] - numbers[-2]
    near = adversarial(np.append(numbers, beyond))
    missing = max(INPUTS - near.size, 60_000)
    return np.concatenate(
        [near, random_bits(missing // 2), random_near(numbers, missing - missing // 2)]
    )


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take_path(request.param, monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("name", ML_FORMATS)
class TestNamedFormats:
    def test_as_in_ml_dtypes(self, name: str, path: str) -> None:
        x = inputs_of(name)
        assert x.size >= 200_000
        assert_same_bits(unscaled(name, x), ML_FORMATS[name].round(x), x)

    def test_codes_as_in_ml_dtypes(self, name: str) -> None:
        reference = ML_FORMATS[name]
        x = inputs_of(name)
        x = np.where(np.isnan(x), np.float32(np.nan if reference.has_nan else 0), x)
        codes = quantize(torch.from_numpy(x), TensorScheme(format=name), QParams(1.0))
        theirs = reference.codes(x)
        if reference.bits == 8 and name.endswith("uz"):  # ml_dtypes: the NaN of fnuz is 0x80
            assert reference.codes(np.array([np.nan], dtype=np.float32)) == 0x80
        assert np.array_equal(codes.numpy().astype(np.int64), theirs)

    def test_values_as_in_ml_dtypes(self, name: str) -> None:
        reference = ML_FORMATS[name]
        codes = torch.arange(2**reference.bits, dtype=torch.int32)
        values = dequantize(codes, TensorScheme(format=name), QParams(1.0))
        assert_same_bits(values, reference.values(), codes.numpy().astype(np.float32))

    def test_the_largest_number(self, name: str) -> None:
        assert formats.get(name).largest == ML_FORMATS[name].largest


@pytest.mark.parametrize("name", TORCH_FORMATS)
def test_as_in_torch(name: str, path: str) -> None:
    x = inputs_of(name)
    largest = ML_FORMATS[name].largest
    theirs = torch.from_numpy(x).clamp(-largest, largest).to(TORCH_FORMATS[name])
    assert_same_bits(unscaled(name, x), theirs.float().numpy(), x)
    if theirs.element_size() == 1:
        keep = ~np.isnan(x)
        codes = quantize(torch.from_numpy(x[keep]), TensorScheme(format=name), QParams(1.0))
        assert np.array_equal(codes.numpy(), theirs.view(torch.uint8).numpy()[keep])


def test_fp32_is_fp32(path: str) -> None:
    x = np.concatenate([random_bits(200_000), adversarial(np.array([0.0, 1.0]))])
    largest = np.finfo(np.float32).max
    assert_same_bits(unscaled("fp32", x), np.clip(x, -largest, largest), x)


SHAPES = [(x, m) for x in range(1, 9) for m in range(11)]
VARIANTS = ("", "fn", "fnuz")
NO_NUMBERS = ["e1m0", "e1m0_overflow", "e1m0_nosub", "e1m3_nosub"]
"""IEEE formats with one exponent bit hold subnormal numbers alone."""


def specials_of(x: int, m: int, variant: str, biased: bool) -> str:
    """Return what the names promise: below eight bits `fn` has no NaN; the OCP formats never."""
    if variant == "fn" and 1 + x + m < 8:
        return "finite"
    if not variant and not biased and (x, m) in ((2, 1), (2, 3), (3, 2)):
        return "finite"
    return variant or "ieee"


def all_variants(x: int, m: int) -> Iterator[tuple[str, Enumerated]]:
    """Yield name and reference of every variant of ExMy that holds a number beside 0."""
    for variant in VARIANTS:
        standard = 2 ** (x - 1) - (variant != "fnuz")
        for bias in (None, max(0, standard - 5), 128):
            specials = specials_of(x, m, variant, bias is not None)
            for flags in ("", "_nosub", "_overflow", "_nosub_overflow"):
                if x == 1 and specials == "ieee" and (m == 0 or "nosub" in flags):
                    continue
                middle = "" if bias is None else f"b{bias}"
                name = f"e{x}m{m}{middle}{variant}{flags}"
                reference = Enumerated(
                    *(x, m, standard if bias is None else bias, specials),
                    subnormals="nosub" not in flags,
                    saturating="overflow" not in flags,
                )
                yield name, reference


def some_variants(x: int, m: int) -> list[tuple[str, Enumerated]]:
    """Return every fifth variant: any flag meets any bias in one shape or another."""
    return list(all_variants(x, m))[(x + m) % 5 :: 5]


def some_numbers(reference: Enumerated) -> np.ndarray:
    """Return the ends of the range and of some binades, numbers at random, and one beyond."""
    count = len(reference.values)
    m = reference.mantissa_bits
    rng = np.random.default_rng(0)
    binades = np.arange(reference.top >> m) << m
    binades = binades if len(binades) < 24 else np.r_[binades[:8], binades[-8:], binades[::37]]
    ends = np.concatenate([np.arange(12), count - np.arange(12), rng.integers(0, count + 1, 60)])
    codes = np.concatenate([ends, *(binades + offset for offset in (-1, 0, 1, 2))])
    codes = np.unique(codes.clip(0, count))
    codes = np.unique(np.concatenate([codes, (codes + 1).clip(0, count)]))
    return np.unique(reference.numbers(count + 1)[codes])


@pytest.mark.parametrize(("x", "m"), SHAPES)
def test_every_small_float_by_its_numbers(x: int, m: int, path: str) -> None:
    for name, reference in all_variants(x, m):
        numbers = some_numbers(reference)
        inputs = np.concatenate([adversarial(numbers), random_near(numbers, 300)])
        try:
            assert_same_bits(
                unscaled(name, inputs), reference.round(inputs).astype(np.float32), inputs
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize(("x", "m"), SHAPES)
def test_double_precision_rounds_once(x: int, m: int) -> None:
    """A value just beside a tie would become the tie in fp32."""
    for name, reference in some_variants(x, m):
        numbers = some_numbers(reference)
        ties = (numbers[1:] + numbers[:-1]) / 2
        near = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, 0), numbers])
        inputs = np.concatenate([near, -near, [0.0, -0.0, np.inf, -np.inf, np.nan, 1e300, -1e-300]])
        ours = unscaled(name, inputs)
        try:
            assert_same_bits(ours, reference.round(inputs), inputs)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize(("x", "m"), SHAPES)
def test_every_small_float_as_in_gfloat(x: int, m: int) -> None:
    gfloat = pytest.importorskip("gfloat", reason="gfloat is not installed: not compared with it")
    for name, reference in some_variants(x, m):
        expressible = reference.subnormals and not (x == 1 and reference.specials == "ieee")
        if not expressible or len(reference.values) < reference.finite_codes:
            continue
        nans = {"ieee": 2**m - 1, "fn": 1}.get(reference.specials, 0)
        info = gfloat.FormatInfo(
            name,
            1 + x + m,
            m + 1,
            bias=reference.bias,
            is_signed=True,
            domain=getattr(gfloat.Domain, "Extended" if reference.specials == "ieee" else "Finite"),
            has_nz=reference.specials != "fnuz",
            num_high_nans=nans,
            has_subnormals=True,
            is_twos_complement=False,
        )
        numbers = some_numbers(reference)
        inputs = adversarial(numbers)
        saturating = reference.saturating or reference.specials == "finite"
        wide = inputs.astype(np.float64)
        theirs = gfloat.round_ndarray(info, wide, sat=saturating)
        theirs = np.where(np.isnan(inputs), np.nan, theirs)
        with np.errstate(over="ignore"):
            theirs = theirs.astype(np.float32)
        try:
            assert_same_bits(unscaled(name, inputs), theirs, inputs)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize(("x", "m"), [shape for shape in SHAPES if sum(shape) <= 9])
def test_codes_and_numbers(x: int, m: int) -> None:
    for name, reference in all_variants(x, m):
        scheme = TensorScheme(format=name)
        sign = reference.top
        codes = torch.arange(2 * sign, dtype=torch.int16)
        numbers = dequantize(codes, scheme, QParams(1.0))
        assert_same_bits(numbers, _numbers_of_all_codes(reference), codes.numpy().astype("f4"))
        plain = numbers.isfinite()
        again = quantize(numbers[plain], scheme, QParams(1.0)).short()
        expected = codes[plain]
        if not reference.subnormals:  # codes with a field of 0 all mean 0
            magnitude = expected % sign
            zero = 0 if reference.specials == "fnuz" else expected - magnitude
            expected = torch.where(magnitude < 1 << m, zero, expected)
        assert torch.equal(again, expected), name


def _numbers_of_all_codes(reference: Enumerated) -> Floats:
    half = reference.numbers(reference.top)
    half[reference.finite_codes :] = np.nan
    if reference.specials == "ieee":
        half[reference.finite_codes] = np.inf
    both = np.concatenate([half, -half])
    if reference.specials == "fnuz":
        both += 0.0  # −0 + 0 = 0
        both[reference.top] = np.nan
    with np.errstate(over="ignore"):
        return both.astype(np.float32)


@pytest.mark.parametrize(("x", "m"), [shape for shape in SHAPES if sum(shape) <= 9])
def test_the_code_of_nan(x: int, m: int) -> None:
    nan = torch.tensor([0.0, float("nan")])
    for name, reference in all_variants(x, m):
        scheme = TensorScheme(format=name)
        if reference.specials == "finite" or (reference.specials == "ieee" and m == 0):
            with pytest.raises(DataError, match="NaN"):
                quantize(nan, scheme, QParams(1.0))
        else:
            codes = quantize(nan, scheme, QParams(1.0))
            assert dequantize(codes, scheme, QParams(1.0)).isnan().tolist() == [False, True], name


def test_the_code_of_infinity() -> None:
    scheme = TensorScheme(format="e5m2_overflow")
    x = torch.tensor([torch.inf, -torch.inf, 61440.0, 61439.0])
    assert quantize(x, scheme, QParams(1.0)).tolist() == [0x7C, 0xFC, 0x7C, 0x7B]


@pytest.mark.parametrize("name", ["e4m3b129", "e8m10b200", "e1m10b147"])
def test_a_bias_far_below_fp32_is_refused(name: str) -> None:
    with pytest.raises(TunerError, match="choose a bias of -126 to 128"):
        formats.get(name)


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_format_without_numbers_is_refused(name: str) -> None:
    with pytest.raises(TunerError, match="no number but 0"):
        formats.get(name)
