"""Every format: what is saved computes the same when it is loaded, and is as small as it costs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tuner import (
    OpConfig,
    PerChannel,
    PerGroup,
    QuantizedModel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    formats,
    quantization,
)
from tuner.errors import SaveError
from tuner.packed_tensor import check_parts, pack_tensor, unpack_tensor
from tuner.qparams import fake_quantize

NAMES = formats.names()
SPELLED = ("e8m7", "e3m0", "e4m3fn_overflow", "e5m2_nosub", "e4m3fn_unscaled", "abfp12_n16")
BITS = {"int4": 4 + 32 / 256, "e4m3fn": 8 + 32 / 256, "fp16": 16, "mxfp4": 4.25, "nvfp4": 4.5}
"""Of one weight with its share of the scales, in rows of 256."""


class Net(nn.Module):
    """Layers whose rows are no whole number of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 70)
        self.conv = nn.Conv1d(70, 12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.embed(tokens).mT).relu().mT)  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def quantized(config: OpConfig, model: nn.Module, batch: Tensor) -> QuantizedModel:
    space = SearchSpace(rules=[Rule(options=[config])])
    return quantization.fit(model, [batch], config=TuningConfig(space=space))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.signbit(a), torch.signbit(b)) and torch.equal(a, b)


@pytest.mark.parametrize("name", [*NAMES, *SPELLED])
def test_what_is_loaded_computes_the_same(name: str, tmp_path: Path) -> None:
    weight = TensorScheme(format=name, granularity=PerChannel(0))
    inputs = TensorScheme(format=name)
    tokens = torch.randint(0, 11, (4, 7))
    model = quantized(OpConfig(weight=weight, inputs=inputs), net(), tokens)
    model.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", net(1))
    with torch.no_grad():
        assert same(again(tokens), model(tokens))
        assert not torch.equal(model(tokens), net()(tokens)) or name == "fp32"
    assert repr(again.model) == repr(model.model)
    again.save(tmp_path / "twice")
    first, second = (tmp_path / n / "weights.safetensors" for n in ("out", "twice"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_as_small_as_the_plan_costs(name: str, tmp_path: Path) -> None:
    weight = TensorScheme(format=name, granularity=PerChannel(0))
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 192, bias=False))
    model = quantized(OpConfig(weight=weight), layer, torch.randn(2, 256))
    costs = model.result.best.costs["size_bytes"]
    path = model.save(tmp_path / "out") / "weights.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(path).values()) == costs
    assert path.stat().st_size == pytest.approx(costs, abs=500)  # names, shapes and dtypes
    if name in BITS:
        assert 8 * costs / (256 * 192) == pytest.approx(BITS[name], rel=0.001)


@pytest.mark.parametrize(
    ("scheme", "stored"),
    [
        (TensorScheme(format="mxfp4"), {"scale": torch.uint8}),
        (TensorScheme(format="mxint8"), {"scale": torch.uint8}),
        (TensorScheme(format="nvfp4"), {"scale": torch.uint8, "global_scale": torch.float32}),
        (TensorScheme(format="abfp4"), {"scale": torch.bfloat16}),
        (TensorScheme(format="abfp12_n16"), {"scale": torch.bfloat16}),
        (TensorScheme(format="nf4"), {"scale": torch.float32}),
        (TensorScheme(format="bf16"), {}),
        (TensorScheme(format="e4m3fn", granularity=PerGroup(32)), {"scale": torch.float32}),
        (
            TensorScheme(format="uint4", symmetric=False),
            {"scale": torch.float32, "zero_point": torch.int32},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "tiny", "huge", "zeros", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scales_are_stored_in_their_own_width(
    scheme: TensorScheme, stored: dict[str, torch.dtype], kind: str, dtype: torch.dtype
) -> None:
    x = _values(kind, dtype)
    if kind == "nan" and scheme.format in ("mxfp4", "mxint8"):
        x[0, 5] = torch.nan  # its block is NaN, whatever the format
    wide = {torch.float64: torch.float64}.get(dtype, torch.float32)
    parts = pack_tensor(x, scheme)
    own = formats.get(scheme.format).block is not None
    expected = {n: t if own or t != torch.float32 else wide for n, t in stored.items()}
    assert {name: part.dtype for name, part in parts.items()} == {"codes": torch.uint8, **expected}
    found = unpack_tensor(parts, scheme, tuple(x.shape), dtype)
    reference = fake_quantize(x, scheme)
    assert torch.equal(found.isnan(), reference.isnan())
    assert torch.equal(found.nan_to_num(), reference.nan_to_num())


@pytest.mark.parametrize("name", ["int8", "fp32", "bf16", "e5m2", "e5m2_overflow"])
def test_the_ends_of_half_precision(name: str) -> None:
    """What rounds to more than the type can hold is its largest number, in both ways."""
    x = torch.tensor([[65504.0, -65504.0, torch.inf, -torch.inf, 1.0]], dtype=torch.float16)
    scheme = TensorScheme(format=name)
    found = unpack_tensor(pack_tensor(x, scheme), scheme, tuple(x.shape), x.dtype)
    assert torch.equal(found, fake_quantize(x, scheme))


def _values(kind: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(6, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "tiny":
        x *= 10.0 ** torch.arange(-44, -20, 4).double()[:, None]
    elif kind == "huge":
        x *= torch.finfo(dtype).max / 10.0 ** torch.arange(1, 7).double()[:, None]
    elif kind == "zeros":
        x[:4] = 0.0
    x = x.clamp(-3e38, 3e38)
    return x.to(dtype)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, formats.Format]:
    """The table of formats with a codebook and two functions, for one test."""
    table = dict(formats._TABLE)
    monkeypatch.setattr(formats, "_TABLE", table)
    formats.register("test_thirds", codebook=[-1, -1 / 3, 0, 1 / 3, 1], block_size=16)
    formats.register("test_floor", forward=torch.floor, largest=7.0)
    formats.register("test_random", forward=lambda x: x + torch.rand_like(x), largest=7.0)
    return table


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("name", ["test_thirds", "test_floor"])
def test_custom_formats(name: str, tmp_path: Path) -> None:
    test_what_is_loaded_computes_the_same(name, tmp_path)


@pytest.mark.usefixtures("table")
def test_a_function_that_is_random_is_saved_as_it_is(tmp_path: Path) -> None:
    weight = TensorScheme(format="test_random")
    layer = nn.Sequential(nn.Linear(4, 4))
    model = quantized(OpConfig(weight=weight), layer, torch.randn(2, 4))
    model.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", layer)
    assert torch.equal(again.model[0].weight, model.model[0].weight)  # type: ignore[index]


def test_a_custom_format_that_is_not_registered_or_another(
    table: dict[str, formats.Format], tmp_path: Path
) -> None:
    tokens = torch.randint(0, 11, (4, 7))
    model = quantized(OpConfig(weight=TensorScheme(format="test_thirds")), net(), tokens)
    model.save(tmp_path / "out")
    table["test_thirds"] = formats.get("nf4")
    with pytest.raises(SaveError, match=r"'test_thirds' is .*register the same one"):
        quantization.load(tmp_path / "out", net())
    del table["test_thirds"]
    with pytest.raises(SaveError, match=r"'test_thirds' .*formats.register"):
        quantization.load(tmp_path / "out", net())


@pytest.mark.parametrize("part", ["codes", "scale", "global_scale"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    scheme = TensorScheme(format="nvfp4")
    parts = dict(pack_tensor(torch.randn(4, 32), scheme))
    del parts[part]
    with pytest.raises(SaveError, match=rf"w\.{part}.*nvfp4"):
        check_parts(parts, scheme, "w")
