"""The fused kernels of accelerators, compiled for the CPU, against the other paths bit for bit."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tuner.kernels.grid
from tests.contracts.references import (
    ML_FORMATS,
    adversarial,
    assert_same_bits,
    random_bits,
    take_path,
)
from tests.tuner.nets import ConvNet, inputs_for, seeded
from tuner import TuningConfig, quantization
from tuner.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from tuner.kernels import fused, graphs, native
from tuner.kernels.graphs import GRAPHS
from tuner.qparams import QParams, compute_qparams, fake_quantize
from tuner.schemes import TensorScheme

ROUNDINGS = ("floor", "ceil", "rceil", "even")
# a view of the tensor for each way in which scales lie, in several shapes
LAYOUTS: dict[str, tuple[Granularity, tuple[tuple[int, ...], ...]]] = {
    "one": (PerTensor(), ((7, 100), (512,), (2, 1, 3))),
    "rows": (PerChannel(0), ((7, 100), (100, 7), (9, 9), (2, 3, 4, 5))),
    "groups are rows": (PerGroup(4), ((7, 100), (1, 8), (3, 3, 4))),
    "tokens are rows": (PerToken(), ((7, 10), (2, 3, 4))),
    "middle axis": (PerChannel(1), ((3, 5, 40), (4, 4, 4), (2, 3, 2, 3))),
    "last axis": (PerChannel(-1), ((7, 100), (9, 9), (2, 3, 4))),
    "groups of a middle axis": (PerGroup(3, 1), ((2, 6, 5), (3, 3, 3), (2, 9, 2, 2))),
    "ragged groups": (PerBlock(32), ((7, 100), (2, 33), (3, 2, 65))),
}


@pytest.fixture
def fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fused kernels take all tensors on the CPU; nothing else may fail over."""
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "SMALLEST", 1)
    monkeypatch.setattr(GRAPHS, "_broken", set())
    monkeypatch.setattr(tuner.kernels.grid, "takes", lambda x: False)


@contextmanager
def path_of(name: str) -> Iterator[None]:
    """Take another path than the fused one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "DEVICES", set())
        if name == "native":
            patch.setattr(tuner.kernels.grid, "takes", native.takes)
        else:
            take_path("torch", patch)
        yield


def on(path: str, x: Tensor, scheme: TensorScheme, qparams: QParams | None = None) -> Tensor:
    with path_of(path):
        return fake_quantize(x, scheme, qparams)


def gradient_of(x: Tensor, upstream: Tensor, scheme: TensorScheme, qparams: QParams) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fake_quantize(leaf, scheme, qparams), leaf, upstream)
    return gradient


def odd_values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return halves of whole numbers, normal numbers of all sizes, and what is no number."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-12, 12, shape, generator=generator)
    x = torch.randn(shape, generator=generator) * 2.0**exponents
    halves = torch.randint(-300, 300, shape, generator=generator) / 2
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, x, halves)
    special = torch.tensor([torch.nan, torch.inf, -0.0, -torch.inf, 1e-40, -1e-44])
    x.view(-1)[: len(special)] = special[: x.numel()]
    return x.to(dtype)


def near_ties(scale: float, dtype: torch.dtype) -> Tensor:
    """Return what a division that is not rounded to nearest puts on the wrong side."""
    powers = 2.0 ** torch.arange(-20, 20)
    ties = torch.cat([torch.arange(-300, 300) + 0.5, powers, -powers]).double()
    near = (ties * torch.tensor(scale).double()).to(dtype)
    away = near.nextafter(torch.full_like(near, torch.inf))
    return torch.cat([near, away, near.nextafter(torch.full_like(near, -torch.inf))])


def assert_same(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    integers = torch.int16 if ours.itemsize == 2 else torch.int32
    bits = [t.detach().contiguous().view(integers).masked_fill(nan, 0) for t in (ours, theirs)]
    assert torch.equal(*bits)


class _Counted:
    """How many graphs were compiled inside."""

    def __enter__(self) -> "_Counted":
        self._before = len(GRAPHS)
        return self

    def __exit__(self, *error: object) -> None:
        self.count = len(GRAPHS) - self._before


@pytest.mark.usefixtures("fused_path")
class TestFormats:
    @pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2", "e2m1", "fp16", "bf16"])
    def test_as_ml_dtypes_rounds(self, name: str) -> None:
        reference = ML_FORMATS[name]
        with np.errstate(invalid="ignore"):
            numbers = np.unique(np.abs(reference.values().astype(np.float64)))
            numbers = numbers[np.isfinite(numbers)]
            x = np.concatenate([adversarial(numbers), random_bits(100_000)])
            expected = reference.round(x)
            if not reference.has_negative_zero:
                expected = expected + np.float32(0)
        scheme = TensorScheme(format=name)
        ours = fake_quantize(torch.from_numpy(x), scheme, QParams(1.0))
        assert_same_bits(ours, expected, x)

    @pytest.mark.parametrize("path", ["native", "torch"])
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            *((name, torch.float32) for name in ("int8", "uint8", "int4", "e4m3fn", "e2m1")),
            *((name, torch.float32) for name in ("e3m4_nosub", "e5m2_overflow", "e4m3fnuz")),
            *((name, torch.float32) for name in ("e4m3fn_overflow", "bf16", "fp16", "e4m0")),
            ("int4", torch.bfloat16),
            ("e5m2", torch.bfloat16),
            ("e8m5_overflow_unscaled", torch.float16),
        ],
    )
    def test_as_other_paths_round(self, name: str, dtype: torch.dtype, path: str) -> None:
        for scale in (0.5, 0.3, 3e5, 1e-38):
            x = torch.cat([odd_values((2000,), dtype), near_ties(scale, dtype)])
            scheme, qparams = TensorScheme(format=name), QParams(scale)
            assert_same(fake_quantize(x, scheme, qparams), on(path, x, scheme, qparams))

    def test_shared_graphs(self) -> None:
        """All integers share one graph; so do all plain floats, and all others of a kind."""
        x = odd_values((50, 40))
        with _Counted() as counted:
            for name in ("int2", "int8", "int16", "uint4"):
                fake_quantize(x, TensorScheme(format=name, symmetric=name != "int8"))
            for name in ("e4m3fn", "e5m2", "e2m1", "fp16"):
                fake_quantize(x, TensorScheme(format=name))
            for name in ("e4m3fnuz", "e3m4_nosub", "e5m2_overflow"):
                fake_quantize(x, TensorScheme(format=name))
            for name in ("bf16", "e4m0", "e8m5"):
                fake_quantize(x, TensorScheme(format=name))
        assert counted.count <= 4
        assert len(GRAPHS) >= 4


@pytest.mark.usefixtures("fused_path")
class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_all_shapes_by_one_graph(self, layout: str) -> None:
        granularity, shapes = LAYOUTS[layout]
        scheme = TensorScheme(format="int4", symmetric=False, granularity=granularity)
        with _Counted() as counted:
            for shape in shapes:
                x = odd_values(shape)
                qparams = compute_qparams(torch.randn(shape), scheme)
                native = on("native", x, scheme, qparams)
                grid = tuner.qparams.grid_of(scheme, qparams, x)
                assert_same(grid.fused.snap(x), native)
                assert_same(fake_quantize(x, scheme, qparams), native)
        assert counted.count <= 1

    @pytest.mark.parametrize("layout", ["one", "rows", "ragged groups"])
    def test_gradients(self, layout: str) -> None:
        granularity, shapes = LAYOUTS[layout]
        scheme = TensorScheme(format="int4", symmetric=False, granularity=granularity)
        for shape in shapes:
            x = odd_values(shape)
            qparams = compute_qparams(torch.randn(shape), scheme)
            upstream = torch.randn(shape)
            if layout == "one":  # the ends of the range lie inside
                x.view(-1)[-2:] = torch.tensor(tuner.qparams.grid_of(scheme, qparams, x).inside)
            with path_of("torch"):
                expected = gradient_of(x, upstream, scheme, qparams)
            assert_same(gradient_of(x, upstream, scheme, qparams), expected)

    def test_memory_orders(self) -> None:
        x = odd_values((3, 5, 6, 7))
        last = x.to(memory_format=torch.channels_last)
        for view in (x, last, x.mT, last.permute(1, 0, 3, 2), x[:, ::2], x[1:]):
            for granularity in (PerTensor(), PerChannel(1)):
                scheme = TensorScheme(format="int4", granularity=granularity)
                qparams = compute_qparams(view.nan_to_num(0, 1, -1), scheme)
                assert_same(
                    fake_quantize(view, scheme, qparams), on("torch", view, scheme, qparams)
                )

    def test_result_may_be_changed_in_place(self) -> None:
        weight = torch.nn.Parameter(torch.tensor([[-1.0, 1.0, 0.5], [1.0, -1.0, 0.2]]))
        fake_quantize(weight, TensorScheme(format="int8")).relu_().sum().backward()
        assert weight.grad is not None
        assert weight.grad.tolist() == [[0, 1, 1], [1, 0, 1]]


@pytest.mark.usefixtures("fused_path")
class TestMx:
    @pytest.mark.parametrize("rounding", ROUNDINGS)
    @pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxint8"])
    def test_as_other_paths_round(self, name: str, rounding: str) -> None:
        scheme = TensorScheme.model_validate({"format": name, "scale_rounding": rounding})
        for shape in ((60, 64), (60, 100), (60, 20)):
            powers = torch.arange(shape[0]) * 4.4 - 140  # of the scales, to both ends of fp32
            x = odd_values(shape) * (2.0 ** powers.double()).unsqueeze(1)
            x = x.clamp(-3.4e38, 3.4e38).float()
            x[1] = 0
            with _Counted() as counted:
                ours = fake_quantize(x, scheme)
            assert counted.count <= 1
            for path in ("native", "torch"):
                assert_same(ours, on(path, x, scheme))

    def test_all_by_one_graph(self) -> None:
        x = torch.randn(4, 64)
        fake_quantize(x, TensorScheme(format="mxfp4"))
        with _Counted() as counted:
            for name in ("mxfp8_e4m3", "mxfp6_e2m3", "mxint8"):
                fake_quantize(torch.randn(5, 2, 32), TensorScheme(format=name))
        assert counted.count == 0

    def test_inverse_scales(self) -> None:
        x, scheme = torch.randn(8, 64), TensorScheme(format="nvfp4")
        qparams = compute_qparams(x, scheme)
        grid = tuner.qparams.grid_of(scheme, qparams, x)
        assert_same(grid.fused.snap(x), on("torch", x, scheme, qparams))


@pytest.mark.usefixtures("fused_path")
class TestCircumstances:
    def test_modes(self) -> None:
        """Neither modes nor threads need graphs of their own, nor change what is computed."""
        x, scheme, qparams = odd_values((50, 40)), TensorScheme(format="int8"), QParams(0.1)
        expected = fake_quantize(x, scheme, qparams)
        results = []
        with _Counted() as counted:
            with torch.inference_mode():
                results.append(fake_quantize(x, scheme, qparams))
                results.append(fake_quantize(x.clone(), scheme, qparams))
            results.append(fake_quantize(results[-1], scheme, qparams))
            with torch.autocast("cpu", torch.bfloat16):
                results.append(fake_quantize(x, scheme, qparams))
            thread = threading.Thread(
                target=lambda: results.append(fake_quantize(x, scheme, qparams))
            )
            thread.start()
            thread.join()
        assert counted.count == 0
        assert len(results) == 5
        for result in results:
            assert_same(result, expected)

    def test_first_compiled_in_inference_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(GRAPHS, "_graphs", {})
        x, scheme, qparams = odd_values((50, 40)), TensorScheme(format="int8"), QParams(0.1)
        with torch.inference_mode():
            inside = fake_quantize(x.clone(), scheme, qparams)
        assert_same(fake_quantize(x, scheme, qparams), inside)
        assert len(GRAPHS) == 1

    def test_default_dtype_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(GRAPHS, "_graphs", {})
        x, scheme, qparams = odd_values((50, 40)), TensorScheme(format="e4m3fn"), QParams(0.1)
        expected = on("torch", x, scheme, qparams)
        torch.set_default_dtype(torch.float64)
        try:
            assert_same(fake_quantize(x, scheme, qparams), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        assert len(GRAPHS) == 1

    def test_contraction_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compilers for accelerators turn products that are summed into one operation."""
        contracted = {
            "cpp.enable_floating_point_contract_flag": "fast",
            "cpp_cache_precompile_headers": False,  # they would be compiled anew
        }
        monkeypatch.setattr(graphs, "_OPTIONS", graphs._OPTIONS | contracted)
        monkeypatch.setattr(GRAPHS, "_graphs", {})
        x, scheme, qparams = odd_values((50, 40)), TensorScheme(format="e4m3fn"), QParams(0.3)
        assert_same(fake_quantize(x, scheme, qparams), on("torch", x, scheme, qparams))
        assert len(GRAPHS) == 1

    def test_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A search gives what it gives on the native path, with one graph for each layout."""

        def outputs() -> Tensor:
            net = seeded(ConvNet)
            x = inputs_for(net, 16)
            target = net(x).detach()

            @torch.no_grad()
            def eval_func(model: torch.nn.Module) -> float:
                return 1 - float((model(x) - target).abs().mean() / target.abs().mean())

            config = TuningConfig(space="mixed-int", max_trials=3)
            return quantization.fit(net, [x], eval_func, config, progress=False)(x).detach()

        monkeypatch.setattr(GRAPHS, "_graphs", {})
        ours = outputs()
        assert len(GRAPHS) <= 3  # weights by rows, two ways, and inputs per tensor
        with path_of("native"):
            assert_same(ours, outputs())


class TestWhatIsNotFused:
    @pytest.mark.usefixtures("fused_path")
    @pytest.mark.parametrize(
        "x",
        [
            torch.randn(4, 8, dtype=torch.float64),
            torch.randn(33)[1:],
            torch._neg_view(torch.randn(8)),
            torch.randn(8).as_subclass(type("Own", (Tensor,), {})),
            torch.zeros(0, 8),
        ],
        ids=["double", "misaligned", "negated view", "subclass", "empty"],
    )
    def test_tensors(self, x: Tensor) -> None:
        assert not fused.fusible(x)
        assert fake_quantize(x, TensorScheme(format="int8"), QParams(0.1)).shape == x.shape

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
    @pytest.mark.usefixtures("fused_path")
    def test_transforms(self) -> None:
        seen = []

        def look(x: Tensor) -> Tensor:
            seen.append(fused.fusible(x))
            return x.clone()

        x = torch.randn(4, 8)
        torch.vmap(look)(x)
        torch.func.grad(lambda v: look(v).sum())(x)
        torch.jit.trace(look, x, check_trace=False)
        torch.compile(look, backend="eager")(x)
        look(x)
        assert seen == [False, False, False, False, True]

    @pytest.mark.usefixtures("fused_path")
    @pytest.mark.parametrize("name", ["nf4", "fp32"])
    def test_formats(self, name: str) -> None:
        x, scheme = torch.randn(8, 64), TensorScheme(format=name)
        grid = tuner.qparams.grid_of(scheme, QParams(1.0), x)
        assert grid.fused.snap(x) is None
        assert_same(fake_quantize(x, scheme), on("torch", x, scheme))

    def test_small_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
        assert fused.fusible(torch.zeros(fused.SMALLEST))
        assert not fused.fusible(torch.zeros(fused.SMALLEST - 1))

    def test_the_cpu(self) -> None:
        assert not fused.fusible(torch.zeros(fused.SMALLEST))

    @pytest.mark.usefixtures("fused_path")
    def test_switched_off(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("ACCUTUNE_FUSED", "0")
        graphs._is_on.cache_clear()
        try:
            with caplog.at_level(logging.DEBUG, "tuner.kernels.graphs"):
                assert not fused.fusible(torch.zeros(8))
            assert "ACCUTUNE_FUSED=0" in caplog.text
        finally:
            graphs._is_on.cache_clear()


_WITHOUT_A_COMPILER = """
import logging
logging.basicConfig(level=logging.DEBUG)
for noisy in ("torch", "filelock", "asyncio"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
import torch
from tuner import QParams, TensorScheme, fake_quantize
from tuner.kernels import fused, graphs, native
graphs.DEVICES.add("cpu")
fused.SMALLEST = 1
x = torch.linspace(-3, 3, 64)
for name in ("int8", "e4m3fn"):
    y = fake_quantize(x, TensorScheme(format=name), QParams(0.1))
    print(y.sum().item(), len(graphs.GRAPHS))
print(fused.fusible(x))
"""


def test_without_a_compiler_torch_does_the_same(tmp_path: Path) -> None:
    environment = os.environ | {
        "CXX": "no-such-compiler",
        "ACCUTUNE_NATIVE": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_A_COMPILER],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    x = torch.linspace(-3, 3, 64)
    sums = [
        fake_quantize(x, TensorScheme(format=name), QParams(0.1)).sum().item()
        for name in ("int8", "e4m3fn")
    ]
    assert done.stdout.split() == [str(sums[0]), "0", str(sums[1]), "0", "False"]
    assert done.stderr.count("no fused kernels for cpu") == 1
    assert "no-such-compiler" in done.stderr


@pytest.fixture(autouse=True)
def _nothing_failed_silently() -> Iterator[None]:
    broken = set(GRAPHS._broken)
    yield
    assert broken == GRAPHS._broken
