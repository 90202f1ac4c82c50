"""Layouts of small floats: their numbers and codes, as the standards print them."""

import math

import pytest

from tuner import formats
from tuner.errors import TunerError
from tuner.float_layout import FloatLayout

# name: largest, smallest normal, smallest, code of the largest, code of NaN
# OCP 8-bit Floating Point v1.0 table 1, OCP Microscaling v1.0 tables 2 to 5, Graphcore's fnuz
PUBLISHED = {
    "e4m3fn": (448.0, 2.0**-6, 2.0**-9, 0x7E, 0x7F),
    "e5m2": (57344.0, 2.0**-14, 2.0**-16, 0x7B, 0x7E),
    "e4m3": (240.0, 2.0**-6, 2.0**-9, 0x77, 0x7C),
    "e3m4": (15.5, 0.25, 2.0**-6, 0x6F, 0x78),
    "e4m3fnuz": (240.0, 2.0**-7, 2.0**-10, 0x7F, 0x80),
    "e5m2fnuz": (57344.0, 2.0**-15, 2.0**-17, 0x7F, 0x80),
    "e4m3b11fnuz": (30.0, 2.0**-10, 2.0**-13, 0x7F, 0x80),
    "e2m3": (7.5, 1.0, 0.125, 0x1F, None),
    "e3m2": (28.0, 0.25, 0.0625, 0x1F, None),
    "e2m1": (6.0, 1.0, 0.5, 0x7, None),
    "fp16": (65504.0, 2.0**-14, 2.0**-24, 0x7BFF, 0x7E00),
    "bf16": (float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-133, 0x7F7F, 0x7FC0),
    "e4m3fn_nosub": (448.0, 2.0**-6, 2.0**-6, 0x7E, 0x7F),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_published(name: str) -> None:
    layout = formats.get(name).layout
    assert layout is not None
    got = layout.largest, layout.smallest_normal, layout.smallest
    assert (*got, layout.largest_code, layout.nan_code) == PUBLISHED[name]


OVERFLOWS = {
    ("ieee", True): 240.0,
    ("ieee", False): math.inf,
    ("fn", False): math.nan,
    ("fnuz", False): math.nan,
    ("finite", False): 480.0,
}


@pytest.mark.parametrize(("key", "expected"), OVERFLOWS.items(), ids=str)
def test_what_is_too_large(key: tuple[str, bool], expected: float) -> None:
    specials, saturating = key
    layout = FloatLayout(4, 3, 7, specials, saturating=saturating)  # type: ignore[arg-type]
    assert layout.overflow == expected or (math.isnan(expected) and math.isnan(layout.overflow))


def test_numbers_of_e2m1() -> None:
    layout = FloatLayout(2, 1, 1, "finite")
    assert [layout.number(code) for code in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    flushed = FloatLayout(2, 1, 1, "finite", subnormals=False)
    assert [flushed.number(code) for code in range(4)] == [0, 0, 1, 1.5]


def test_what_fp32_cannot_hold_is_left_out() -> None:
    assert FloatLayout(8, 2, 100, "fn").largest == 1.75 * 2.0**127
    assert FloatLayout(8, 0, 127, "fn").largest == 2.0**127


BAD = {
    (0, 3, 0, "ieee"): "1 to 8 exponent bits",
    (9, 3, 255, "ieee"): "1 to 8 exponent bits",
    (4, -1, 7, "ieee"): "mantissa bits",
    (4, 24, 7, "ieee"): "mantissa bits",
    (4, 3, 129, "ieee"): "choose a bias of -126 to 128",
    (4, 3, -127, "ieee"): "choose a bias of -126 to 128",
    (1, 0, 0, "ieee"): "no number but 0",
}


@pytest.mark.parametrize(("arguments", "message"), BAD.items(), ids=str)
def test_bad_layouts_are_refused(arguments: tuple[int, int, int, str], message: str) -> None:
    with pytest.raises(TunerError, match=message):
        FloatLayout(*arguments)  # type: ignore[arg-type]
