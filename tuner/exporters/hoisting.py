"""Quantizes earlier what is only moved about before it is quantized: same values, more fusion.

max(Q(x)) = Q(max(x)) for every monotone Q, and what only moves values, or puts zeros beside them,
commutes with Q as well. Where a convolution's output goes through max pooling, padding or
concatenation to a quantizer, a copy of that quantizer is put right behind the convolution: runtimes
then compute all of it on integers. The quantizer itself stays: on values that are codes already it
changes nothing. What something else reads as well, as floats or by another quantizer, stays as it
is.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from tuner.exporters.markers import MARKER
from tuner.exporters.tracing import Traced, copied_graph, is_marker
from tuner.quantizer import Quantizer

_ATEN = torch.ops.aten
_MOVING = {
    _ATEN.max_pool1d.default,
    _ATEN.max_pool2d.default,
    _ATEN.max_pool3d.default,
    _ATEN.adaptive_max_pool2d.default,
    _ATEN.flatten.using_ints,
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.squeeze.dim,
    _ATEN.unsqueeze.default,
    _ATEN.slice.Tensor,
    _ATEN.contiguous.default,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.pixel_shuffle.default,
    _ATEN.channel_shuffle.default,
}
_CAT = _ATEN.cat.default
_PADDINGS = {_ATEN.pad.default, _ATEN.constant_pad_nd.default}
_LENGTH = _ATEN.sym_size.int
_OUTSIDE = ("placeholder", "get_attr")


def hoisted(traced: Traced) -> Traced:
    """Return the graph with quantizers also before what commutes with them."""
    module = copied_graph(traced.module)
    pending = [node for node in module.graph.nodes if is_marker(node)]
    while pending:
        marker = pending.pop()
        quantizer = traced.quantizers[str(marker.args[1])]
        if quantizer.is_elementwise and _is_read_alike(traced, marker, quantizer):
            pending += _hoist(module.graph, marker)
    module.graph.lint()
    module.recompile()
    return replace(traced, module=module)


def _is_read_alike(traced: Traced, marker: fx.Node, quantizer: Quantizer) -> bool:
    """Whether all that reads the values which a marker quantizes has them from its quantizer."""
    source = marker.args[0]
    assert isinstance(source, fx.Node)
    return all(
        is_marker(user) and traced.quantizers[str(user.args[1])].gives_as(quantizer)
        for user in source.users
        if user.target is not _LENGTH
    )


def _hoist(graph: fx.Graph, marker: fx.Node) -> list[fx.Node]:
    """Put copies of a marker on the inputs of the node before it; return the copies."""
    mover = marker.args[0]
    assert isinstance(mover, fx.Node)
    copies = []
    for source in list(_moved(mover)):
        with graph.inserting_after(source):
            made = graph.call_function(MARKER, (source, marker.args[1]))
        made.meta.update(source.meta)
        mover.replace_input_with(source, made)
        copies.append(made)
    return copies


def _moved(mover: fx.Node) -> Iterator[fx.Node]:
    """Yield the tensors that a node moves about, but those that no op computes."""
    if mover.target in _MOVING or (mover.target in _PADDINGS and _pads_zeros(mover)):
        sources = [mover.args[0]]
    elif mover.target is _CAT:
        sources = list(mover.args[0])  # type: ignore[arg-type]
    else:
        return
    for source in dict.fromkeys(sources):
        assert isinstance(source, fx.Node)
        if source.op not in _OUTSIDE and not is_marker(source):
            yield source


def _pads_zeros(node: fx.Node) -> bool:
    """Whether a node pads with zeros: pad(x, pad, mode='constant', value=None)."""
    if node.target is _ATEN.constant_pad_nd.default:
        return not (node.args[2] if len(node.args) > 2 else 0)
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else None
    return mode != "constant" or not value
