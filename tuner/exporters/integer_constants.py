"""Constants of a graph: what follows from parameters alone, and which of them are weights."""

import warnings
from collections.abc import Iterable
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor, fx

from tuner.exporters.integer_forms import rewrite
from tuner.exporters.integer_values import Array
from tuner.exporters.tracing import Traced, TracedWeight, is_marker

Constants = dict[fx.Node, Tensor]


def functional(traced: Traced) -> fx.GraphModule:
    """Return the traced graph without ops that work in place, in the forms that are integers."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies specs that it deprecated
        program = traced.exported(traced.module).run_decompositions({})
        graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    rewrite(graph)
    return graph


def constants_of(graph: fx.GraphModule) -> Constants:
    """Return the tensors of the graph's attributes, and of what is computed from them alone."""
    found: Constants = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(graph)
            if isinstance(value, Tensor):
                found[node] = value.detach()
        elif _follows(node, found):
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                found[node] = value
    return found


def _follows(node: fx.Node, found: Constants) -> bool:
    sources = node.all_input_nodes
    return (
        node.op == "call_function"
        and bool(sources)
        and not is_marker(node)
        and all(source in found for source in sources)
    )


def weights_of(traced: Traced, constants: Constants) -> dict[fx.Node, TracedWeight]:
    """Return the nodes of the functional graph that are quantized weights."""
    places = {_place(weight.values): weight for weight in traced.weights}
    return {n: places[_place(t)] for n, t in constants.items() if _place(t) in places}


def without_followers(constants: Constants, weights: Iterable[fx.Node]) -> Constants:
    """Leave out what is computed from weights: that is done with their integers."""
    followers: set[fx.Node] = set()
    kept = set(weights)
    for node in constants:
        if node not in kept and any(n in kept or n in followers for n in node.all_input_nodes):
            followers.add(node)
    return {node: value for node, value in constants.items() if node not in followers}


def _place(value: Tensor) -> tuple[object, ...]:
    return value.data_ptr(), tuple(value.shape), value.stride()


def as_array(value: Tensor) -> Array:
    """Return a tensor as numpy has it; fp16 and bf16 become fp32."""
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    return np.array(value.detach().cpu().numpy(), order="C")
