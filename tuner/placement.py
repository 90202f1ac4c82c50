"""What a deployment target asks of the search space, beyond what the user asks.

A target takes options away that it has no kernel for, and adds what its kernels need around them:
an integer convolution gives integers only where what follows reads integers. A residual sum
therefore has its inputs quantized as soon as a convolution that feeds it is: it follows, and is
nothing that a strategy must choose.
"""

from collections.abc import Callable, Mapping, Sequence

from tuner.errors import SpaceError
from tuner.graph import Node, OpGraph
from tuner.ops import Op
from tuner.presets import Candidate
from tuner.records import describe_config
from tuner.schemes import OpConfig, TensorScheme
from tuner.search_space import FLOAT

WhyNot = Callable[[Op, OpConfig], str | None]
"""Returns why a target has no kernel for an op's choice, None if it has."""

Followers = Mapping[str, tuple[str, ...]]
"""Op → the ops that it follows: quantized as soon as one of these takes quantized inputs."""

_THROUGH = ("batch_norm", "dropout")
_SUMS = ("add",)


def runnable(
    ops: Mapping[str, Op],
    candidates: Mapping[str, Sequence[Candidate]],
    why_not: WhyNot,
    target: str,
) -> dict[str, list[Candidate]]:
    """Return the candidates that a target has kernels for, FP32 among them.

    Raises SpaceError where a rule asks for one that it has none for, or where nothing is left.
    """
    found: dict[str, list[Candidate]] = {}
    reasons: dict[str, None] = {}
    for name, options in candidates.items():
        found[name] = []
        for option in options:
            why = None if option.config.is_float else why_not(ops[name], option.config)
            if why is not None and option.given:
                raise SpaceError(
                    f"{name} ({ops[name].type}): target {target!r} cannot run the rule's option "
                    f"{describe_config(option.config)}: {why}. Choose another option, or another "
                    "target"
                )
            if why is None:
                found[name].append(option)
            else:
                reasons.setdefault(f"{option.label} of {name}: {why}")
    if all(option.config.is_float for options in found.values() for option in options):
        shown = "; ".join(list(reasons)[:3])
        raise SpaceError(
            f"target {target!r} can run no option of this space ({shown}): choose another space, "
            "such as int8, or another target"
        )
    return {name: options or [FLOAT] for name, options in found.items()}


def residual_sums(graph: OpGraph) -> dict[str, tuple[str, ...]]:
    """Return the sums of two tensors that a convolution feeds directly, and these convolutions."""
    found = {}
    for node in graph.nodes:
        op = graph.ops.get(node.op or "")
        if op is None or op.type not in _SUMS or len(op.activations) != 2:
            continue
        feeding = [_producer(graph, index) for index in node.inputs]
        names = [f for f in feeding if f is not None and graph.ops[f].type.startswith("Conv")]
        if names:
            found[op.name] = tuple(dict.fromkeys(names))
    return found


def _producer(graph: OpGraph, index: int) -> str | None:
    """Return the op whose output a node's is, but for what folding removes."""
    while index >= 0:
        node: Node = graph.nodes[index]
        if node.op is not None:
            return node.op if node.op in graph.ops else None
        if node.function not in _THROUGH or not node.inputs:
            return None
        index = node.inputs[0]
    return None


def following(ops: Mapping[str, Op], names: Sequence[str]) -> dict[str, list[Candidate]]:
    """Return the candidates of ops that follow: both inputs at 8 bits, and FP32."""
    scheme = TensorScheme(format="uint8", symmetric=False, calibration="mse")
    found = {}
    for name in names:
        inputs = tuple(scheme for _ in range(ops[name].operand_count))
        found[name] = [Candidate("A8", OpConfig(inputs=inputs)), FLOAT]
    return found
