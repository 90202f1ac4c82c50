"""The rules of the house hold for the source as it is, and each checker can find a breach."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.architecture import (
    PACKAGES,
    Modules,
    cycles,
    forbidden_imports,
    from_texts,
    hidden_imports,
    layer_breaches,
    long_files,
    prints,
    rank_breaches,
    read_modules,
    relative_and_star_imports,
)

ROOT = Path(__file__).parents[1]

# Inside `tuner`, a module imports only from its own line or a line above.
ORDER = (
    ("errors", "version", "subclasses", "saved_files", "allocator"),
    ("float_layout",),
    (
        "formats",
        "granularity",
        "criteria",
        "tensors",
        "scores",
        "isolation",
        "repairs",
        "evenly",
        "live",
    ),
    ("schemes",),
    ("plan", "config", "saved_formats"),
    ("kernels", "packing", "ranges", "histogram", "records"),
    ("blocks", "statistics", "calibrators", "row_statistics", "calibrate", "ops", "batches"),
    ("slices", "operands"),
    ("qparams", "quantizer", "weights", "packed_tensor", "biases"),
    ("bias_corrections", "norm_statistics"),
    ("sites", "example", "graph", "capture", "model", "observe", "data_pass", "gradients"),
    ("presets", "sensitivity", "costs", "recovery"),
    ("storage_errors", "evaluation"),
    ("exporters",),
    ("op_times", "latency"),
    ("prices", "tuning_units"),
    ("op_rules", "search_space", "rescaling"),
    ("report", "results", "progress", "storage"),
    ("placement", "narrow_sums"),
    (
        "op_table",
        "nothing_quantized",
        "predictions",
        "saving",
        "quantized_model",
        "preparation",
        "simulate",
    ),
    ("sweep_entries", "trainable_model", "training_result", "training_progress"),
    ("session", "sweep", "trainable_preparation", "training", "plan_training"),
    ("quantization", "recipes"),
    ("cli_tasks", "cli_export"),
    ("cli",),
    ("__main__",),
)
RANKS = {f"tuner.{name}": rank for rank, names in enumerate(ORDER) for name in names}

FORBIDDEN = {
    "tuner.exporters": ("tuner.session", "tuner.quantization"),
    "tuner.report": ("tuner.session", "tuner.quantization"),
    "server.routes": ("torch",),
    "server.dashboard": ("torch",),
    **{
        f"tuner.exporters.integer_{part}": ("torch", "tuner.exporters.tracing")
        for part in (
            "convolutions",
            "functions",
            "layers",
            "products",
            "runner",
            "shapes",
            "values",
        )
    },
}

# file → why it is not split
LONG_FILES = {
    "tests/tuner/test_qparams.py": "one table of cases, all against the same references",
    "tests/tuner/test_blocks.py": "one table of block formats, all against the same references",
    "tests/server/test_jobs.py": "one suite over all that the queue promises",
    "tests/tuner/test_fused.py": "one suite over all that the fused kernels promise",
    "tests/tuner/test_native.py": "one suite over all that the native kernels promise",
    "tests/tuner/test_quantization.py": "one suite over all that fit() promises",
}

MAY_PRINT = ("tuner.cli",)

Checker = Callable[[Modules], list[str]]
CHECKERS: dict[str, Checker] = {
    "layers": layer_breaches,
    "ranks": partial(rank_breaches, ranks=RANKS),
    "forbidden": partial(forbidden_imports, forbidden=FORBIDDEN),
    "cycles": cycles,
    "relative or star": relative_and_star_imports,
    "hidden": hidden_imports,
    "prints": partial(prints, allowed=MAY_PRINT),
}


@pytest.fixture(scope="module")
def modules() -> Modules:
    """All modules of the three packages."""
    return read_modules(ROOT)


@pytest.mark.parametrize("rule", CHECKERS)
def test_the_source_keeps_the_rule(rule: str, modules: Modules) -> None:
    assert CHECKERS[rule](modules) == []


def test_all_packages_are_read(modules: Modules) -> None:
    assert set(PACKAGES) <= modules.keys()
    assert "tuner.recipes.digits_resnet" in modules


def test_every_rank_belongs_to_a_module(modules: Modules) -> None:
    assert RANKS.keys() <= modules.keys()


def test_no_file_is_too_long() -> None:
    files = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")]
    counts = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in files
    }
    assert long_files(counts, LONG_FILES) == []


BREACHES: dict[str, tuple[str, Modules]] = {
    "strategies from tuner": ("layers", from_texts(strategies__auto="import tuner.formats")),
    "strategies with torch": ("layers", from_texts(strategies__auto="from torch import nn")),
    "tuner from server": ("layers", from_texts(tuner__cli="from server.jobs import Job")),
    "in a function": ("layers", from_texts(tuner__cli="def f():\n    import server")),
    "up a rank": ("ranks", from_texts(tuner__errors="import tuner.schemes")),
    "a name from a package above": (
        "ranks",
        from_texts(tuner__ops="", tuner__ops__conv="from tuner import session", tuner__session=""),
    ),
    "no rank": ("ranks", from_texts(tuner__surprise="")),
    "report from session": (
        "forbidden",
        from_texts(tuner__report__page="from tuner import session", tuner__session=""),
    ),
    "a route with torch": ("forbidden", from_texts(server__routes__jobs="import torch.nn")),
    "two modules": ("cycles", from_texts(tuner__a="import tuner.b", tuner__b="import tuner.a")),
    "three modules": (
        "cycles",
        from_texts(
            tuner__a="from tuner import b",
            tuner__b="from tuner.c import x",
            tuner__c="import tuner.a",
        ),
    ),
    "through the own package's __init__": (
        "cycles",
        from_texts(tuner="from tuner.a import x", tuner__a="from tuner import x"),
    ),
    "through another package's __init__": (
        "cycles",
        from_texts(
            tuner__graph="import tuner.ops.base",
            tuner__ops="import tuner.ops.conv",
            tuner__ops__base="",
            tuner__ops__conv="import tuner.graph",
        ),
    ),
    "under TYPE_CHECKING": (
        "cycles",
        from_texts(tuner__a="if TYPE_CHECKING:\n    import tuner.b", tuner__b="import tuner.a"),
    ),
    "relative": ("relative or star", from_texts(tuner__a="from . import b")),
    "star": ("relative or star", from_texts(tuner__a="from tuner.b import *")),
    "hidden": ("hidden", from_texts(tuner__a="def f():\n    import ray")),
    "hidden, no package named": (
        "hidden",
        from_texts(tuner__a="def f():\n    import ray  # slow to load"),
    ),
    "hidden, one of ours": (
        "hidden",
        from_texts(tuner__a="def f():\n    import tuner.b  # breaks a cycle in tuner"),
    ),
    "prints": ("prints", from_texts(tuner__a="def f():\n    print('x')")),
}


@pytest.mark.parametrize("case", BREACHES)
def test_a_breach_is_found(case: str) -> None:
    rule, bad = BREACHES[case]
    assert len(CHECKERS[rule](bad)) == 1


KEPT: dict[str, tuple[str, Modules]] = {
    "tuner from strategies": ("layers", from_texts(tuner__session="import strategies")),
    "what strategies may": ("layers", from_texts(strategies__tpe="import math, numpy, optuna")),
    "down a rank": ("ranks", from_texts(tuner__schemes="import tuner.errors", tuner__errors="")),
    "a package and its parts": (
        "cycles",
        from_texts(
            tuner__ops="import tuner.ops.conv",
            tuner__ops__conv="from tuner.ops import base",
            tuner__ops__base="",
        ),
    ),
    "a cycle that only a call closes": (
        "cycles",
        from_texts(tuner__a="import tuner.b", tuner__b="def f():\n    import tuner.a"),
    ),
    "an optional package": (
        "hidden",
        from_texts(tuner__a="def f():\n    import ray  # optional: ray"),
    ),
    "the command line": ("prints", from_texts(tuner__cli="print('x')")),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_allowed_is_no_breach(case: str) -> None:
    rule, good = KEPT[case]
    assert CHECKERS[rule](good) == []


def test_long_files_and_needless_excuses_are_found() -> None:
    counts = {"tuner/a.py": 401, "tuner/b.py": 400, "tuner/c.py": 500}
    excuses = {"tuner/b.py": "was longer once", "tuner/c.py": "a table"}
    assert long_files(counts, excuses) == ["tuner/a.py has 401 lines", "tuner/b.py needs no excuse"]
