"""The raw lines of the benchmark as tables in Markdown."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import export_columns
import latency_columns
import metric_columns

HERE = Path(__file__).parent
RUNS = HERE / "raw" / "runs"
SPEED = HERE / "raw" / "speed"
KERNELS = HERE / "raw" / "kernels"
ROUNDING = HERE / "raw" / "rounding"
QAT = HERE / "raw" / "qat"
SERVICE = HERE / "raw" / "service"
EXPORT = HERE / "raw" / "export"
LATENCY = HERE / "raw" / "latency"
METRIC = HERE / "raw" / "metric"
RESULTS = HERE / "RESULTS.md"

Row = Mapping[str, Any]
_RUN_KEY = ("model", "space", "has_repairs", "strategy", "seed")

_INTRODUCTION = """\
# Benchmark

`make bench` tunes models that were trained on real data and writes this page from the raw lines in
`raw/`, which hold every trial. Of several runs of the same kind the newest counts. Evaluations do
not count the baseline's own.
"""

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("space", lambda r: r["space"]),
    ("repairs", lambda r: "yes" if r["has_repairs"] else "no"),
    ("strategy", lambda r: r["strategy"]),
    ("trials allowed", lambda r: str(r["max_trials"])),
    ("evaluations", lambda r: str(r["evaluations"])),
    ("first that passed", lambda r: "–" if r["first_pass"] is None else str(r["first_pass"])),
    ("returned trial", lambda r: str(r["best_trial"])),
    ("BOPs", lambda r: f"{r['bops_ratio']:.2%}"),
    ("BOPs, Linear and Conv2d", lambda r: f"{r['layer_bops_ratio']:.2%}"),
    ("size", lambda r: f"{r['size_ratio']:.1%}"),
    ("accuracy", lambda r: f"{r['accuracy']:.4f}"),
    ("ops quantized", lambda r: f"{r['quantized_ops']} of {r['ops']}"),
    ("wall s", lambda r: f"{r['wall_s']:.1f}"),
    ("outside eval_func", lambda r: f"{r['outside_s'] / r['wall_s']:.0%}"),
    ("the same in FP32 evaluations", lambda r: f"{r['outside_s'] / r['baseline_eval_s']:.1f}"),
    ("ρ of damage", lambda r: _rho(r["damage_correlation"])),
    ("stopped", lambda r: r["stop_reason"]),
)
_TASK_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("evaluation set", lambda r: r["task"]),
    ("metric", lambda r: r["metric"]),
    ("FP32", lambda r: f"{r['baseline']:.4f}"),
    ("one FP32 evaluation, s", lambda r: f"{r['baseline_eval_s']:.2f}"),
)
_ROUNDING_INTRODUCTION = """\
`python tests/bench/rounding.py`: accuracy with weights at few bits (per channel, MSE scales, all
else in float), by how they are rounded; in brackets the seconds of one core for all weights.
Weights that an embedding shares stay float. The last column is the least drop of the three against
that of rounding to nearest.
"""


def _rounded(way: str) -> Callable[[Row], str]:
    return lambda row: (
        f"{row['accuracies'][way]:.4f} ({row['seconds'][way]:.1f})"
        if way in row["accuracies"]
        else "–"
    )


def _least_share(row: Row) -> str:
    drops = {way: row["baseline"] - value for way, value in row["accuracies"].items()}
    plain = drops.pop("nearest")
    return f"{min(drops.values()) / plain:.0%}" if plain > 0 and drops else "–"


_ROUNDING_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("weights", lambda r: f"W{r['bits']}"),
    ("FP32", lambda r: f"{r['baseline']:.4f}"),
    *((way, _rounded(way)) for way in ("nearest", "gptq", "quantease", "adaround")),
    ("least drop ÷ drop to nearest", _least_share),
)
_QAT_INTRODUCTION = """\
`python tests/bench/qat.py`: the digits ResNet, every op quantized, trained under its plan for 40
epochs on the training set; accuracies on the test set, over all seeds. Learned scales start at
those of the paper, or at the calibrated ones.
"""
_QAT_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("bits", lambda r: f"W{r['bits']}A{r['bits']}"),
    ("method", lambda r: r["method"]),
    ("start", lambda r: r["init"]),
    ("seeds", lambda r: str(len(r["seeds"]))),
    ("calibrated only", lambda r: _span((s["before"] for s in r["seeds"]), ".4f")),
    ("trained", lambda r: _span((s["after"] for s in r["seeds"]), ".4f")),
    ("FP32", lambda r: _span((s["baseline"] for s in r["seeds"]), ".4f")),
    ("drop, worst", lambda r: f"{max(r['drops']):.2%}"),
    ("drop, mean", lambda r: f"{sum(r['drops']) / len(r['drops']):.2%}"),
    ("s", lambda r: _span((s["training_s"] for s in r["seeds"]), ".0f")),
)
_SPEED_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("FP32 evaluation, s", lambda r: f"{r['float_s']:.3f}"),
    ("int8 plan of fit() ÷ FP32", lambda r: f"{r['int8_s'] / r['float_s']:.2f}"),
    *(
        (f"{name} ÷ FP32", lambda r, n=name: _format_ratio(r, n))
        for name in ("int8", "int4", "e4m3fn", "mxfp4")
    ),
    ("switch ÷ FP32, first", lambda r: f"{r['cold_switch_s'] / r['float_s']:.1%}"),
    ("switch ÷ FP32, later", lambda r: f"{r['switch_s'] / r['float_s']:.1%}"),
    ("repeats", lambda r: str(r["repeats"])),
)
_KERNEL_KEY = ("owner", "what", "mib", "threads")
_KERNEL_INTRODUCTION = """\
`python tests/bench/kernels.py`: the time of a call ÷ the time of `torch.Tensor.copy_` of the same
fp32 tensor to another that exists already; medians of calls and copies that alternate. The last
column is the least of one call on 1,024 values. Backward reads two tensors and writes one.

Machines and runs differ; the newest counts, here of an AMD EPYC. Without a compiler integers take
four passes, and a copy of 16 MiB is fast where the cache holds it: int8 took 2.2 there in chunks of
192 Ki values and takes 1.9 in chunks of twice that. An Intel Xeon was at 2.4 (16 MiB) and 1.7 (64
MiB); floats, with two buffers beside the result, took 5.1 (e4m3fn, 64 MiB) on it in chunks of 384
Ki and 4.3 in chunks of half that. With a compiler int8 and e4m3fn took 1.03 to 1.08 (16 MiB) and
0.9 (64 MiB) there. On an AMD EPYC MXFP8 came from 1.76 to 1.1 by fetching ahead, by scales of 16
blocks at a time and by not fetching what is only written, and mxint8 from 1.5 to 1.2. Backward
took 1.9 (16 MiB) and 1.8 (64 MiB) there until results of 8 MiB and more were streamed past the
cache: 1.3 to 1.6 and 1.2, in turns with torch.add, which also reads two tensors and writes one, at
1.35 and 1.3. In an hour with noisy neighbours backward took up to 2.1, the MX formats 1.5 to 1.8,
and small calls twice as long. What reads a streamed result next gains, too.
"""
_SPEED_INTRODUCTION = """\
Interleaved medians. A switch goes from all-int8 to a plan that differs in every op with a weight;
the first one quantizes the weights, a later one finds them in the cache. The columns int8 to mxfp4
are `quantization.simulate` with that format on all weights (per channel) and inputs (static, per
tensor; MX takes its scales from each tensor).

Freed memory is kept, as in the command line and the service; without that FP32 loses more than the
simulation, and the ratios are lower. An operand that is copied takes as long as one that is
rounded: what is left is memory traffic, which differs between machines and hours, and attention
whose products stand apart, so that they can be rounded: 12 % of the ViT, 8 % of char-lm. The newest
runs count, here of a quiet Intel Xeon; there copies in place of roundings gave the ViT 1.28 beside
1.28, char-lm 1.25 beside 1.22. On an AMD EPYC with AVX-512 int8 ÷ FP32 of the ViT was 1.14, of
char-lm 1.16, of digits-depthwise 1.15, and 1.17, 1.27 and 1.47 in other hours, the last one in an
hour in which FP32 took a third of the time. The raw lines hold them all.
"""
_SERVICE_ROWS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("jobs submitted over HTTP by 8 clients, /s", lambda r: f"{r['submissions_per_s']:.0f}"),
    (
        "1,000 jobs and more, claimed, renewed and ended by 20 workers, /s",
        lambda r: f"{r['claims_per_s']:.0f}",
    ),
    ("from a trial's commit to each of 100 streams, median", lambda r: _ms(r["stream_s"])),
    ("the same, longest of 10,000", lambda r: _ms(r["slowest_stream_s"])),
    ("a page of 100 of 10,000 trials, median", lambda r: _ms(r["page_s"])),
    ("the same, slowest of 100", lambda r: _ms(r["slowest_page_s"])),
    ("one trial of 10,000", lambda r: _ms(r["one_trial_s"])),
    ("the dashboard's page of that job", lambda r: _ms(r["dashboard_s"])),
    ("the server's memory after 2,000 requests", lambda r: f"{r['first_mib']:.0f} MiB"),
    ("the same after 20,000", lambda r: f"{r['last_mib']:.0f} MiB"),
)
_SERVICE_INTRODUCTION = """\
`python tests/bench/service.py`: `tuner serve` as a process of its own, what asks it on the same
machine. Every job was claimed exactly once, every stream got every trial, every page was read.
"""
_NOTES = """\
- **BOPs** and **size** are ratios to FP32 of the plan that was returned. BOPs count every MAC of
  the model; the next column counts those of Linear and Conv2d only.
- **first that passed**: the first trial that met the goal; **returned trial**: the cheapest one.
- **outside eval_func**: the share of the wall time of `fit` that was not spent in `eval_func`.
- **minilm** is judged by recall@10. The finer mean reciprocal rank falls from 0.5364 to 0.5307
  under uniform W8A8 (1.07 %), so by that metric uniform int8 just misses a 1 % goal.
- These runs had one thread each and shared the machine with other work: their evaluations and plans
  count, their seconds do not.
- **ρ of damage**: Spearman's rank correlation of the predicted damage with the measured accuracy
  drop, over the trials of that run.
"""


def append(row: Row, folder: Path) -> None:
    """Add a raw line to the file of its model."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{row['model']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def render() -> None:
    """Write RESULTS.md from all raw lines."""
    runs = [{**row, "has_repairs": bool(row.get("repairs"))} for row in _read(RUNS)]
    rows = _newest(runs, _RUN_KEY)
    speeds = _newest(_read(SPEED), ("model",))
    kernels = _newest(_read(KERNELS), _KERNEL_KEY)
    services = _newest(_read(SERVICE), ("database",))
    exports = _newest(_with_vnni(_read(EXPORT)), ("has_vnni", "model", "space", "target"))
    latencies = _newest(_with_vnni(_read(LATENCY)), ("has_vnni", "model", "space", "target"))
    metrics = _newest(_read(METRIC), ("target",))
    tasks = {row["model"]: row for row in rows if row["strategy"] == "auto"}
    parts = [
        _INTRODUCTION,
        "## Models\n",
        _table(_TASK_COLUMNS, tasks.values()),
        "## Runs\n",
        _goals(rows),
        _table(_COLUMNS, rows),
        _NOTES,
        "## Rounding\n",
        _ROUNDING_INTRODUCTION,
        _table(_ROUNDING_COLUMNS, _newest(_read(ROUNDING), ("model", "bits"))),
        "## Training\n",
        _QAT_INTRODUCTION,
        _table(_QAT_COLUMNS, _trained(_read(QAT))),
        "## Speed of simulated evaluations\n",
        _SPEED_INTRODUCTION,
        _table(_SPEED_COLUMNS, speeds),
        "## Kernels\n",
        _KERNEL_INTRODUCTION,
        _kernel_table(kernels),
        "## Exports\n",
        export_columns.INTRODUCTION,
        _table(export_columns.COLUMNS, [row for row in exports if row["has_vnni"]]),
        export_columns.WITHOUT_VNNI_INTRODUCTION,
        _table(export_columns.COLUMNS, [row for row in exports if not row["has_vnni"]]),
        "## Metrics of artifacts\n",
        metric_columns.INTRODUCTION,
        _table(metric_columns.COLUMNS, metrics),
        "## Latency as the objective\n",
        latency_columns.INTRODUCTION,
        _table(latency_columns.COLUMNS, latencies),
        "## Service\n",
        _SERVICE_INTRODUCTION,
        _turned_table(_SERVICE_ROWS, services, "database"),
        "## Machine\n",
        _machines([*rows, *speeds, *kernels, *exports, *latencies, *services]),
    ]
    RESULTS.write_text("\n".join(parts), encoding="utf-8")


def _trained(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each kind of run: the newest of every seed, together."""
    kinds: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for row in rows:
        kinds.setdefault((row["bits"], row["method"], row["init"]), {})[row["seed"]] = row
    found = []
    for key in sorted(kinds, reverse=True):
        seeds = list(kinds[key].values())
        drops = [row["baseline"] - row["after"] for row in seeds]
        found.append({**seeds[0], "seeds": seeds, "drops": drops})
    return found


def _span(values: Iterable[float], shown: str) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:{shown}} to {high:{shown}}"


def _read(folder: Path) -> list[Row]:
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def _with_vnni(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows with whether their machine had VNNI, as all had that do not tell."""
    for row in rows:
        yield {**row, "has_vnni": row["machine"].get("vnni", True)}


def _newest(rows: Iterable[Row], keys: tuple[str, ...]) -> list[Row]:
    newest = {tuple(row[key] for key in keys): row for row in rows}
    return [newest[key] for key in sorted(newest)]


def _table(columns: Iterable[tuple[str, Callable[[Row], str]]], rows: Iterable[Row]) -> str:
    columns = tuple(columns)
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _kernel_table(rows: Sequence[Row]) -> str:
    """Return one line for each implementation, with a column for each size and thread count."""
    cases = sorted({(row["threads"], row["mib"]) for row in rows})
    titles = ["", "", *(f"{m} MiB, {t} thread{'s' * (t > 1)}" for t, m in cases), "1,024 values"]
    lines = [titles, ["---"] * len(titles)]
    for owner, what in dict.fromkeys((row["owner"], row["what"]) for row in rows):
        own = {
            (r["threads"], r["mib"]): r for r in rows if (r["owner"], r["what"]) == (owner, what)
        }
        cells = [f"{own[case]['ratio']:.2f}" if case in own else "–" for case in cases]
        small = [row["small_s"] for row in own.values() if row["small_s"] is not None]
        cells.append(f"{min(small) * 1e6:.1f} µs" if small else "–")
        lines.append([owner, what, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _turned_table(
    lines: Iterable[tuple[str, Callable[[Row], str]]], rows: Sequence[Row], title: str
) -> str:
    """Return a table with a column for each row."""
    first = ("", lambda r: str(r[title]))
    columns = [[name, *(cell(row) for row in rows)] for name, cell in (first, *lines)]
    columns.insert(1, ["---"] * (len(rows) + 1))
    return "".join(f"| {' | '.join(line)} |\n" for line in columns)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _goals(rows: Iterable[Row]) -> str:
    goals = sorted({(row["max_drop"], row["seed"]) for row in rows})
    return "".join(
        f"Goal: at most {drop:.1%} below FP32 (relative). Seed: {seed}.\n" for drop, seed in goals
    )


def _machines(rows: Iterable[Row]) -> str:
    kinds = sorted(
        {
            "{processor}, {cores} cores, {threads} threads, Python {python}, torch {torch}".format(
                **row["machine"]
            )
            for row in rows
        }
    )
    loads = [row["machine"]["load_1min"] for row in rows] or [0.0]
    shared = f"- load average at the start of a run: {min(loads)} to {max(loads)}\n"
    return "".join(f"- {kind}\n" for kind in kinds) + shared


def _format_ratio(row: Row, name: str) -> str:
    seconds = row.get("formats_s", {}).get(name)
    return "–" if seconds is None else f"{seconds / row['float_s']:.2f}"


def _rho(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
