"""A model of the user's class whose forward runs an exported artifact: for eval_func."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tuner.errors import ExportError
from tuner.example import Example, outputs_of
from tuner.exporters.agreement import Run
from tuner.model import InstrumentedModel
from tuner.subclasses import set_class, subclassed


def artifact_model(model: InstrumentedModel, example: Example, run: Run) -> nn.Module:
    """Return a copy of the user's model that runs the artifact where the model is called.

    Other methods and attributes are the model's own. Raises ExportError where its outputs cannot
    be put together again.
    """
    twin = model.copy()
    twin.apply({})
    user = twin.model
    args, kwargs = example.call(example.tensors)
    with torch.no_grad():
        output = user(*args, **kwargs)
    leaves, spec = pytree.tree_flatten(output)
    _check(output, leaves)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = Example.of_call(model.model, args, kwargs)
        if call.names != example.names:
            raise ExportError(
                f"the artifact takes {', '.join(example.names)}, and eval_func gives "
                f"{', '.join(call.names)}: export with example_inputs of such a call"
            )
        _check_types(example, call)
        found = iter(run([tensor.contiguous() for tensor in call.tensors]))
        filled = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, spec)

    user.__dict__.pop("forward", None)
    set_class(user, subclassed(type(user), {"forward": forward}))
    return user.eval()


def _check_types(example: Example, call: Example) -> None:
    """Refuse inputs of other types than the artifact takes: some runtimes would misread them."""
    for name, wanted, given in zip(example.names, example.tensors, call.tensors, strict=True):
        if wanted.dtype != given.dtype:
            raise ExportError(
                f"the artifact takes {name} as {wanted.dtype}, and eval_func gives {given.dtype}: "
                "export with example_inputs of that type"
            )


def _check(output: Any, leaves: list[Any]) -> None:
    """Refuse outputs whose tensors are found otherwise than an artifact gives them."""
    _, expected = outputs_of(output)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(found) != len(expected) or any(a is not b for a, b in zip(found, expected, strict=True)):
        raise ExportError(
            f"the model returns a {type(output).__name__}, which cannot be put together from the "
            "artifact's tensors: evaluate the file with code of your own"
        )
