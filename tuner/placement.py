"""What a deployment target asks of the search space, beyond what the user asks.

A target takes options away that it has no kernel for, and adds what its kernels need around them:
an integer convolution gives integers only where what follows reads integers. A residual sum
therefore has its inputs quantized as soon as a convolution that feeds it is: it follows, and is
nothing that a strategy must choose. And it gives integers of one scale only: whatever reads the
output of a convolution or of such a sum reads it in one way. (With 4 bits for the convolutions of
three residual blocks and 8 for their sums, ONNX Runtime computes the stem and the sums in float,
and takes 1.6 to 3 times as long as with either for both; OpenVINO makes a pass over memory for each
further scale, and takes 1.2 to 1.4 times as long. Elsewhere readers may differ: for queries, keys
and values in 8, 6 and 4 bits both are as fast as with one scale for all three.) What a kernel
rounds by itself is put into the options, too, so that the simulation rounds the same: biases that
count in steps of products, and no output of a convolution that adds before it rounds.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tuner.biases import bias_problem
from tuner.errors import SpaceError
from tuner.exporters.kernel_rows import codes
from tuner.graph import Node, OpGraph
from tuner.ops import Op
from tuner.presets import Candidate
from tuner.records import describe_config
from tuner.schemes import OpConfig, TensorScheme
from tuner.search_space import FLOAT, labelled

WhyNot = Callable[[Op, OpConfig], str | None]
"""Returns why a target has no kernel for an op's choice, None if it has."""

_THROUGH = ("batch_norm", "dropout")
_WITHIN = (
    *(*_THROUGH, "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clip"),
    *("max_pool1d", "max_pool2d", "max_pool3d"),
)
"""Functions that integer kernels take in, or that runtimes compute on codes."""

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
                reasons.setdefault(f"{option.label} of {name or 'the model'}: {why}")
    if all(option.config.is_float for options in found.values() for option in options):
        shown = "; ".join(list(reasons)[:3])
        raise SpaceError(
            f"target {target!r} can run no option of this space ({shown}): choose another "
            "space (most kernels are of int8) or another target (onnx and integer take most ops)"
        )
    return {name: options or [FLOAT] for name, options in found.items()}


def with_integer_biases(
    ops: Mapping[str, Op],
    candidates: Mapping[str, Sequence[Candidate]],
    families: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, list[Candidate]]:
    """Return the candidates, the biases of some families of ops in steps of their products.

    `shapes` are those of the biases that may be rounded, by name. Rules keep their options.
    """
    found: dict[str, list[Candidate]] = {}
    for name, options in candidates.items():
        is_one = ops[name].type.rstrip("123d") in families
        found[name] = [_rounded(ops[name], o, shapes) if is_one else o for o in options]
    return found


def _rounded(op: Op, option: Candidate, shapes: Mapping[str, tuple[int, ...]]) -> Candidate:
    config = option.config.model_copy(update={"bias": TensorScheme(format="int32")})
    if option.given or bias_problem(op, config, shapes) is not None:
        return option
    return replace(option, config=config)


@dataclass(frozen=True)
class Sum:
    """A residual sum: the convolutions that feed it, and the operand that one of them may add to.

    `added_to` is the first operand that is the output of a convolution and that nothing else reads.
    """

    leaders: tuple[str, ...]
    added_to: int | None


def residual_sums(graph: OpGraph) -> dict[str, Sum]:
    """Return the sums of two tensors that a convolution feeds directly, in order of execution."""
    found = {}
    for node in graph.nodes:
        op = graph.ops.get(node.op or "")
        if op is None or op.type not in _SUMS or len(op.activations) != 2:
            continue
        feeding = [_convolution(graph, index) for index in node.inputs]
        leaders = tuple(dict.fromkeys(path.op for path in feeding if path is not None))
        alone = (i for i, path in enumerate(feeding) if path is not None and not path.is_shared)
        if leaders:
            found[op.name] = Sum(leaders, next(alone, None))
    return found


@dataclass(frozen=True)
class _Path:
    """The convolution whose output a tensor is, and whether something else reads it, too."""

    op: str
    is_shared: bool


def _convolution(graph: OpGraph, index: int) -> _Path | None:
    """Return the convolution whose output a node's is, but for what folding removes."""
    is_shared = False
    while index >= 0:
        node: Node = graph.nodes[index]
        is_shared |= len(graph.consumers(index)) > 1 or index in graph.outputs
        if node.op is not None:
            op = graph.ops.get(node.op)
            is_convolution = op is not None and op.type.startswith("Conv")
            return _Path(node.op, is_shared) if is_convolution else None
        if node.function not in _THROUGH or not node.inputs:
            return None
        index = node.inputs[0]
    return None


@dataclass(frozen=True)
class Readers:
    """What reads the tensors of which integer kernels give one scale.

    `groups` are the layers that read one of them, by tensor; `beside` are those that read what a
    residual sum reads, by sum and operand.
    """

    groups: tuple[tuple[str, ...], ...]
    beside: Mapping[str, tuple[tuple[str, ...], ...]]


def readers(graph: OpGraph, sums: Mapping[str, Sum]) -> Readers:
    """Return the layers that read what a convolution gives, or one of these sums."""
    groups: dict[int, dict[str, None]] = {}
    operands: dict[str, list[int]] = {}
    for node in graph.nodes:
        op = graph.ops.get(node.op or "")
        if op is None or not any(_is_integer(graph, index, sums) for index in node.inputs):
            continue
        if op.name in sums:
            operands.setdefault(op.name, [_undropped(graph, index) for index in node.inputs])
        elif op.weights and op.products and op.activations == (0,):
            groups.setdefault(_undropped(graph, node.inputs[0]), {})[op.name] = None
    beside = {
        name: tuple(tuple(groups.get(index, ())) for index in found)
        for name, found in operands.items()
    }
    return Readers(tuple(map(tuple, groups.values())), beside)


def _is_integer(graph: OpGraph, index: int, sums: Mapping[str, Sum]) -> bool:
    """Whether a node's output comes from an integer kernel: of a convolution, or of a sum."""
    while index >= 0:
        node = graph.nodes[index]
        if node.op is not None:
            op = graph.ops.get(node.op)
            return node.op in sums or (op is not None and op.type.startswith("Conv"))
        if node.function not in _WITHIN or not node.inputs:
            return False
        index = node.inputs[0]
    return False


def _undropped(graph: OpGraph, index: int) -> int:
    """Return the node whose output this is when the model is evaluated."""
    while index >= 0 and graph.nodes[index].function == "dropout" and graph.nodes[index].inputs:
        index = graph.nodes[index].inputs[0]
    return index


def following(
    ops: Mapping[str, Op],
    sums: Mapping[str, Sum],
    adds: bool,
    beside: Mapping[str, tuple[tuple[str, ...], ...]],
    candidates: Mapping[str, Sequence[Candidate]],
) -> dict[str, list[Candidate]]:
    """Return the candidates of sums that follow: their inputs at 8 bits, and FP32.

    What the ops `beside` an operand read it with, that may be, too. Where a convolution `adds` the
    other operand before it rounds, its own output stays in float.
    """
    found = {}
    for name, residual in sums.items():
        skipped = residual.added_to if adds else None
        near = beside.get(name, ((),) * ops[name].operand_count)
        schemes = [
            [None] if i == skipped else _schemes(ops[name], i, near[i], candidates)
            for i in range(ops[name].operand_count)
        ]
        configs = [OpConfig(inputs=inputs) for inputs in itertools.product(*schemes)]
        found[name] = [*labelled(configs), FLOAT]
    return found


def _schemes(
    op: Op, index: int, near: Sequence[str], candidates: Mapping[str, Sequence[Candidate]]
) -> list[TensorScheme]:
    """Return what an operand of a sum may be: 8 bits, or what the ops beside it may read."""
    own = TensorScheme(format="uint8", symmetric=False, calibration="mse")
    known = dict.fromkeys([own])
    for option in (option for name in near for option in candidates.get(name, ())):
        scheme = option.config.input_scheme(0)
        if scheme is not None and codes(op, index, scheme) is None:
            known[scheme] = None
    return list(known)
