"""Runs a folder that the target `integer` wrote, in integer arithmetic: numpy and nothing else.

    runner = Runner("exported")
    logits = runner.run(image)[0]

`graph.json` has `format` ("accutune-integer"), `version`, `inputs`, `outputs`, `layers` and
`nodes`, and `weights_sha256`, the digest of the weights.safetensors that it belongs to, which is
checked. A node has a `name`, an `op`, `args` by name ({"node": …} for what another node gave,
{"number": "-inf"} for what JSON has no number for), and by its op:

- `input`: `index` among the inputs. `constant`: the `tensor` of weights.safetensors that it is.
- `integer.weight`: `codes`, `scale` and, where affine, `zero_point`, keys of weights.safetensors;
  `axis` of the scales, null for one scale; with `group`, a scale for each run of so many on it.
- `integer.quantize`: clamp(rne(x / scale) + zero_point, low, high) of floats. `scale` and
  `zero_point` are numbers, or keys of tensors that broadcast to x. With `dynamic`, "tensor" or
  "token", the scale comes from x: symmetric from its largest magnitude, else from its range.
- `integer.requantize`: the same of integers, clamp(zero_point + (x · multiplier) >> (31 + shift),
  low, high), `multiplier` (int32, Q31) and `shift` keys of tensors that broadcast to x; rounded
  once, to nearest with ties up. `low` and `high` may be keys of tensors: a ReLU in between is in
  them.
- `integer.linear`, `integer.conv`, `integer.conv_transpose`, `integer.matmul`: sums of products of
  (code − zero point); `bias` int32 in steps of input scale × weight scale, or codes of a scale of
  their own, `bias_multiplier` and `bias_shift` taking them there. With `left_shift` (version 2) the
  sums are shifted left by so many bits before the bias is added, which counts in steps that much
  finer. `accumulator_bits` is what the worst case of sums needs: Σ |w| · max |x − zero point|,
  shifted, + |bias|; of products of two activations,
  whose length may change, it is that for the length of the example.
- `aten.…`: the function of that name of PyTorch on floats; those in MOVES take codes as they are.
- `python.…`: arithmetic of lengths, and picking from lists.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from tuner.exporters.integer_convolutions import convolved, transposed
from tuner.exporters.integer_functions import FUNCTIONS
from tuner.exporters.integer_layers import each_axis, window_of
from tuner.exporters.integer_products import Accumulators, Overflow
from tuner.exporters.integer_shapes import MOVES, NUMBERS
from tuner.exporters.integer_values import Array, Grid, Integers, broadcast_scale, rescaled

FORMAT, VERSIONS = "accutune-integer", (1, 2)
GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
Node = Mapping[str, Any]


class Runner:
    """Runs an exported graph.

    `accumulator_bits`, `overflow` and `pairs` are those of `Accumulators`; after a run `overflowed`
    says how many sums of which node did not fit. With `round_twice`, what is requantized is
    rounded as gemmlowp does (Jacob et al., CVPR 2018, section 2.2), and some codes are a step off.
    Raises ValueError for a folder of another format, or of files that do not belong together.
    """

    def __init__(
        self,
        folder: str | Path,
        accumulator_bits: int = 64,
        overflow: Overflow = "saturate",
        pairs: bool = False,
        round_twice: bool = False,
    ) -> None:
        graph = json.loads((Path(folder) / GRAPH).read_text(encoding="utf-8"))
        if graph.get("format") != FORMAT or graph.get("version") not in VERSIONS:
            raise ValueError(f"{folder} has no graph of the format {FORMAT} {VERSIONS}")
        contents = (Path(folder) / WEIGHTS).read_bytes()
        written = graph.get("weights_sha256")
        if written is not None and written != hashlib.sha256(contents).hexdigest():
            raise ValueError(
                f"{folder}: {GRAPH} and {WEIGHTS} come from different exports, one of which was "
                "broken off, or one file was changed: export the model again"
            )
        tensors = load(contents)
        self._set(graph, tensors, Accumulators(accumulator_bits, overflow, pairs))
        self._twice = round_twice

    @classmethod
    def of(cls, graph: Mapping[str, Any], tensors: Mapping[str, Array]) -> "Runner":
        """Return a runner of a graph that is in memory."""
        runner = cls.__new__(cls)
        runner._set(graph, tensors, Accumulators())
        runner._twice = False
        return runner

    def _set(
        self, graph: Mapping[str, Any], tensors: Mapping[str, Array], accumulators: Accumulators
    ) -> None:
        self.graph = graph
        self._nodes: list[Node] = graph["nodes"]
        self._outputs = [output["node"] for output in graph["outputs"]]
        self._tensors = tensors
        self._accumulators = accumulators
        self._fixed = {node["name"]: self._loaded(node) for node in self._nodes if _is_kept(node)}
        self._last = _last_uses(self._nodes, self._outputs)

    @property
    def overflowed(self) -> Mapping[str, int]:
        """Node → how many of its sums did not fit the accumulators, in all runs."""
        return dict(self._accumulators.overflowed)

    def run(
        self,
        *inputs: Array,
        forced: Mapping[str, Integers] | None = None,
        reached: dict[str, Integers] | None = None,
    ) -> list[Array]:
        """Return the outputs.

        `reached` gets what every quantizing node gave, by name; those that follow go on with what
        `forced` has in its place.
        """
        values: dict[str, Any] = dict(self._fixed)
        replaced: Mapping[str, Any] = forced or {}
        for node in self._nodes:
            name = node["name"]
            if name not in values:
                is_input = node["op"] == "input"
                value: Any = inputs[node["index"]] if is_input else self._value(node, values)
                if reached is not None and node.get("quantizer"):
                    reached[name] = value
                values[name] = replaced.get(name, value)
            for done in self._last.get(name, ()):
                del values[done]
        return [np.asarray(_floats(values[name])) for name in self._outputs]

    def _loaded(self, node: Node) -> Any:
        if node["op"] == "constant":
            return self._tensors[node["tensor"]]
        codes = self._tensors[node["codes"]]
        reach = codes.shape, node["axis"], node.get("group")
        scale = broadcast_scale(self._tensors[node["scale"]], *reach)
        zero_point = np.asarray(0)
        if node.get("zero_point") is not None:
            zero_point = broadcast_scale(self._tensors[node["zero_point"]], *reach)
        return Integers(codes, scale, zero_point)

    def _value(self, node: Node, values: Mapping[str, Any]) -> Any:
        args = {name: _given(value, values) for name, value in node["args"].items()}
        space, _, name = node["op"].partition(".")
        if space == "integer":
            return _INTEGER[name](self, node, args)
        if name == "getitem":
            return args["self"][args["index"]]
        if space == "python":
            return NUMBERS[name](*args.values())
        return _aten(name, args)

    def number(self, value: Any) -> Array:
        """Return a parameter: a number, or the tensor that a key names."""
        return self._tensors[value] if isinstance(value, str) else np.asarray(value)

    def quantize(self, node: Node, args: Mapping[str, Any]) -> Integers:
        """Run `integer.quantize`."""
        dynamic = node.get("dynamic")
        grid = Grid(
            low=node["low"],
            high=node["high"],
            scale=None if dynamic else self.number(node["scale"]),
            zero_point=self.number(node["zero_point"]),
            symmetric=node["symmetric"],
            per_token=dynamic == "token",
            power_of_two=node.get("power_of_two", False),
        )
        return grid.quantize(_floats(args["x"]))

    def requantize(self, node: Node, args: Mapping[str, Any]) -> Integers:
        """Run `integer.requantize`."""
        multiplier, shift = self.number(node["multiplier"]), self.number(node["shift"])
        steps = rescaled(args["x"].levels, multiplier, shift, self._twice)
        codes = steps + node["zero_point"]
        low, high = self.number(node["low"]), self.number(node["high"])
        held = np.clip(codes, low, high).astype(np.int32)
        return Integers(held, self.number(node["scale"]), np.asarray(node["zero_point"]))

    def linear(self, node: Node, args: Mapping[str, Any]) -> Integers:
        """Run `integer.linear`."""
        x, weight = args["input"], args["weight"]
        sums = self._accumulators.sums(node["name"], x.codes, x.zero_point, weight.levels.T)
        scale = _along(x.scale, -1) * _along(weight.scale, -1).reshape(-1)
        return self._sum(node, sums, scale, 0)

    def conv(self, node: Node, args: Mapping[str, Any]) -> Integers:
        """Run `integer.conv`, of one to three dimensions."""
        x, weight = args["input"], args["weight"]
        window = window_of(
            weight.codes.shape[2:],
            args["stride"],
            args["padding"],
            args["dilation"],
            args["groups"],
        )
        sums = convolved(
            x.codes, weight.levels, window, x.zero_point, self._multiply(node["name"], x.zero_point)
        )
        return self._of_channels(node, sums, x, weight.scale)

    def conv_transpose(self, node: Node, args: Mapping[str, Any]) -> Integers:
        """Run `integer.conv_transpose`."""
        x, weight = args["input"], args["weight"]
        axes = weight.codes.ndim - 2
        window = window_of(
            weight.codes.shape[2:],
            args["stride"],
            args["padding"],
            args["dilation"],
            args["groups"],
        )
        sums = transposed(
            x.codes,
            weight.levels,
            window,
            each_axis(args["output_padding"], axes),
            x.zero_point,
            self._multiply(node["name"], x.zero_point),
        )
        scale = weight.scale
        if scale.ndim:  # one for each output channel of a group
            scale = np.tile(scale.reshape(-1), args["groups"])
        return self._of_channels(node, sums, x, scale)

    def matmul(self, node: Node, args: Mapping[str, Any]) -> Integers:
        """Run `integer.matmul`: `[…, m, k] @ […, k, n]`."""
        a, b = args["self"], args["other"]
        sums = self._accumulators.sums(node["name"], a.codes, a.zero_point, b.levels)
        scale = _along(a.scale, -1) * _along(b.scale, -2)
        return Integers(sums, scale, np.asarray(0))

    def _multiply(self, name: str, zero_point: Array) -> Callable[[Array, Array], Array]:
        def multiply(left: Array, right: Array) -> Array:
            return self._accumulators.sums(name, left, zero_point, right)

        return multiply

    def _of_channels(self, node: Node, sums: Array, x: Integers, scale: Array) -> Integers:
        after = sums.ndim - 2
        shaped = scale.reshape(-1, *[1] * after) if scale.ndim else scale
        return self._sum(node, sums, x.scale * shaped, after)

    def _sum(self, node: Node, sums: Array, scale: Array, after: int) -> Integers:
        """Add the bias, whose channels have so many axes behind them."""
        bias = None if node.get("bias") is None else self._tensors[node["bias"]].astype(np.int64)
        if bias is not None and "bias_multiplier" in node:
            multiplier, shift = (self.number(node[f"bias_{p}"]) for p in ("multiplier", "shift"))
            bias = rescaled(bias, multiplier, shift)
        shaped = None if bias is None else bias.reshape(-1, *[1] * after)
        left = node.get("left_shift", 0)
        held = self._accumulators.added(node["name"], sums << left, shaped)
        return Integers(held, scale.astype(np.float64) / 2.0**left, np.asarray(0))


_INTEGER: dict[str, Callable[[Runner, Node, Mapping[str, Any]], Integers]] = {
    "quantize": Runner.quantize,
    "requantize": Runner.requantize,
    "linear": Runner.linear,
    "conv": Runner.conv,
    "conv_transpose": Runner.conv_transpose,
    "matmul": Runner.matmul,
}


def _is_kept(node: Node) -> bool:
    return node["op"] in ("constant", "integer.weight")


def _last_uses(nodes: list[Node], outputs: list[str]) -> dict[str, list[str]]:
    """Return, for each node, what is not needed after it."""
    last: dict[str, str] = {}
    for node in nodes:
        for name in _names(list(node.get("args", {}).values())):
            last[name] = node["name"]
    found: dict[str, list[str]] = {}
    for name, user in last.items():
        if name not in outputs:
            found.setdefault(user, []).append(name)
    return found


def _names(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for each in value for name in _names(each)]
    return [value["node"]] if isinstance(value, dict) and "node" in value else []


def _given(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_given(each, values) for each in value]
    if isinstance(value, dict):
        return values[value["node"]] if "node" in value else float(value["number"])
    return value


def _floats(value: Any) -> Any:
    return value.floats() if isinstance(value, Integers) else value


def _along(scale: Array, axis: int) -> Array:
    """Return a scale with one entry on the axis that is summed over, along which it is constant."""
    wide = scale.astype(np.float64)
    return wide.take([0], axis=axis) if scale.ndim else wide


def _aten(name: str, args: dict[str, Any]) -> Any:
    first, *rest = args
    value = args[first]
    if isinstance(value, Integers):
        others = {key: _all_floats(args[key]) for key in rest}
        if name == "embedding":
            return value.moved(lambda x: x[others["indices"]])
        if name in MOVES:
            return value.moved(lambda x: MOVES[name](x, **others))
    return FUNCTIONS[name](**{key: _all_floats(each) for key, each in args.items()})


def _all_floats(value: Any) -> Any:
    return [_floats(each) for each in value] if isinstance(value, list) else _floats(value)
