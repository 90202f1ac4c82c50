"""Dense streams of integer codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import DataError
from tuner.packing import code_dtype, pack_codes, packed_size_bytes, unpack_codes

WIDTHS = range(2, 33)


def random_codes(bits: int, signed: bool, *shape: int) -> torch.Tensor:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    return torch.randint(low, high, shape).to(code_dtype(bits, signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 5, 7), (1000,), ()])
def test_round_trip(bits: int, signed: bool, shape: tuple[int, ...]) -> None:
    codes = random_codes(bits, signed, *shape)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size_bytes(codes.numel(), bits),)
    restored = unpack_codes(packed, bits, signed, shape)
    assert restored.dtype == codes.dtype
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 17))
def test_every_code_round_trips(bits: int, signed: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.arange(low, low + 2**bits).to(code_dtype(bits, signed))
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, signed, codes.shape), codes)


@given(st.integers(2, 16), st.data())
def test_layout_is_a_little_endian_bit_stream(bits: int, data: st.DataObject) -> None:
    low = data.draw(st.sampled_from([0, -(2 ** (bits - 1))]))
    codes = data.draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=40))
    stream = sum((code % 2**bits) << (bits * i) for i, code in enumerate(codes))
    expected = stream.to_bytes(packed_size_bytes(len(codes), bits), "little")
    packed = pack_codes(torch.tensor(codes, dtype=torch.int32), bits)
    assert bytes(packed.tolist()) == expected


SIZES = [(0, 2, 0), (1, 2, 1), (4, 2, 1), (5, 2, 2), (8, 3, 3), (3, 3, 2), (5, 7, 5), (3, 16, 6)]


@pytest.mark.parametrize(("numel", "bits", "size"), SIZES)
def test_size(numel: int, bits: int, size: int) -> None:
    assert packed_size_bytes(numel, bits) == size


def test_non_contiguous_codes_are_packed_row_major() -> None:
    codes = random_codes(5, True, 6, 10).t()
    assert torch.equal(unpack_codes(pack_codes(codes, 5), 5, True, (10, 6)), codes)


ERRORS = {
    "too large": lambda: pack_codes(torch.tensor([4]), 2),
    "too small": lambda: pack_codes(torch.tensor([-3]), 2),
    "mixed signs": lambda: pack_codes(torch.tensor([-1, 3]), 2),
    "floats": lambda: pack_codes(torch.tensor([1.0]), 4),
    "bool": lambda: pack_codes(torch.tensor([True]), 4),
    "one bit": lambda: pack_codes(torch.tensor([1]), 1),
    "33 bits": lambda: packed_size_bytes(3, 33),
    "truncated": lambda: unpack_codes(torch.zeros(2, dtype=torch.uint8), 8, True, (3,)),
    "too long": lambda: unpack_codes(torch.zeros(4, dtype=torch.uint8), 8, True, (3,)),
    "no bytes": lambda: unpack_codes(torch.zeros(3), 8, True, (3,)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    with pytest.raises(DataError):
        ERRORS[case]()
