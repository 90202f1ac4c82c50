"""Spells a graph of QDQ as ONNX Runtime is fastest with it on CPU: the same values, up to rounding.

Beside masked softmax and the first convolution of images: sums before a layer norm or a GELU are
Sum, not Add. Of Add and LayerNormalization ONNX Runtime makes one op, which takes three times as
long as both; of Add and Gelu one that takes a third longer.
"""

import torch
from torch import fx

from tuner.exporters.onnx_ops import SUM
from tuner.exporters.onnx_softmax import speed_softmax_up
from tuner.exporters.onnx_stems import speed_stems_up

_ADD = (torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_APART = (torch.ops.aten.layer_norm.default, torch.ops.aten.gelu.default)


def speed_up(module: fx.GraphModule) -> None:
    """Rewrite a graph in place."""
    speed_softmax_up(module)
    speed_stems_up(module)
    _keep_apart(module.graph)


def _keep_apart(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target not in _APART or not isinstance(node.args[0], fx.Node):
            continue
        total = node.args[0]
        if total.target in _ADD and not total.kwargs and len(total.all_input_nodes) == 2:
            with graph.inserting_before(total):
                new = graph.call_function(SUM, total.args)
            new.meta.update(total.meta)
            total.replace_all_uses_with(new)
            graph.erase_node(total)
