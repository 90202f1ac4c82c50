"""The tables of exports: their columns, and what is said before them."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]

INTRODUCTION = """\
`python tests/bench/export.py`: models tuned for the target (1 % goal; ResNet-18, MobileNetV2,
DistilGPT2 and Pythia-70M have random weights: in mixed-int their logits may be 2 % off), exported,
and timed in turns with FP32 in the same runtime, with the threads below; OpenVINO beside FP32 in
ONNX Runtime, too. **plain FP32 export**: what torch.onnx.export writes of the model, in ONNX
Runtime. For target torch, on one thread, FP32 is eager; FP32 and BF16 compiled are baselines beside
it. **difference** is the largest from the simulation at the outputs, beside the simulation's own
floor under a disturbance of 1e-6; **steps** the largest of any quantized tensor, all before it as
simulated. **metric** is that of `eval_func` on the artifact, beside the simulated plan's; where
these are more than 0.2 % apart, ± says how far the disturbance moves the simulation's. The other
core was busy during the runs of mixed-int, and the row of MiniLM in OpenVINO is an older one.
"""


def speedup(entry: Row) -> str:
    """Return how many times faster than FP32 a latency entry is."""
    return f"{entry['float_ms'] / entry['quantized_ms']:.2f}"


def _beside(row: Row, name: str) -> str:
    """Return how many times faster than another baseline each batch is."""
    found = [
        f"{entry['baselines_ms'][name] / entry['quantized_ms']:.2f}"
        for entry in row["latency"]
        if name in entry.get("baselines_ms", {})
    ]
    return " / ".join(found) or "–"


def _beside_plain_export(row: Row) -> str:
    found = row.get("plain_export", [])
    return " / ".join(f"{e['plain_ms'] / e['quantized_ms']:.2f}" for e in found) or "–"


def _times(row: Row) -> str:
    return " / ".join(f"{entry['quantized_ms']:.3g}" for entry in row["latency"])


def _choices(row: Row) -> str:
    counts = Counter(row.get("choices", {}))
    return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "–"


def _metric(row: Row) -> str:
    if row["metric"] is None:
        return "–"
    simulated = row.get("simulated_metric") or row["simulated"]
    floor = row.get("metric_floor")
    return f"{row['metric']:.4f} ({simulated:.4f}{'' if floor is None else f' ± {floor:.4f}'})"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("space", lambda r: r["space"]),
    ("target", lambda r: r["target"]),
    ("ops quantized", lambda r: f"{r['quantized_ops']} of {r['ops']}"),
    ("size ÷ FP32", lambda r: f"{r['size_bytes'] / r['float_size_bytes']:.3f}"),
    ("FP32 ÷ quantized, batch 1 / 8", lambda r: " / ".join(map(speedup, r["latency"]))),
    ("FP32 compiled ÷ quantized", lambda r: _beside(r, "FP32 compiled")),
    ("BF16 compiled ÷ quantized", lambda r: _beside(r, "BF16 compiled")),
    ("FP32 in ONNX Runtime ÷ quantized", lambda r: _beside(r, "FP32 in ONNX Runtime")),
    ("plain FP32 export ÷ quantized", _beside_plain_export),
    ("ms, batch 1 / 8", _times),
    (
        "difference (floor)",
        lambda r: f"{r['agreement']['max_abs']:.2g} ({r['agreement']['floor']:.2g})",
    ),
    ("steps", lambda r: f"{max((x['max_steps'] for x in r['layers']), default=0):.0f}"),
    ("metric (simulated)", _metric),
    ("left in float", lambda r: str(len(r["left_float"]))),
    ("formats of ops", _choices),
)

WITHOUT_VNNI_INTRODUCTION = """\
The same on an AMD EPYC with AVX2 and without VNNI: kernels add two products in 16 bits, so weights
have 7 bits, but for depthwise convolutions.
"""
