"""ReLU6 whose channels were scaled: relu6(x / s) · s = min(max(x, 0), 6) for each channel's s.

A cap of each channel takes the place of the 6 (Nagel et al., ICCV 2019, section 5.1.1, replace
ReLU6 by ReLU instead, which changes the function).
"""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.subclasses import Variant, set_class


def cap(module: nn.Module, channels: int, axis: int, like: Tensor) -> Tensor:
    """Make a ReLU6 one with a cap of each channel along an axis, in place; return the caps.

    They are a buffer of the module, `cap` `[channels, 1 …]`, and 6 at first: on the device of
    `like`, the weight before it, and at least as exact.
    """
    known = module._buffers.get("cap")
    if known is not None:
        return known
    assert isinstance(module, nn.Hardtanh)
    shape = (channels, *[1] * (-1 - axis))
    dtype = torch.promote_types(like.dtype, torch.float32)
    caps = torch.full(shape, float(module.max_val), dtype=dtype, device=like.device)
    module.register_buffer("cap", caps)
    set_class(module, _CAPPED.of(type(module)))
    return module.get_buffer("cap")


def uncap(module: nn.Module) -> None:
    """Make it the ReLU6 again that it was."""
    if "cap" in module._buffers:
        del module._buffers["cap"]
        set_class(module, type(module).__mro__[1])


def _forward(self: Any, x: Tensor) -> Tensor:
    return torch.minimum(x.relu(), self.cap.to(x.dtype))


def _describe(self: Any) -> str:
    return f"caps {float(self.cap.min()):.4g} to {float(self.cap.max()):.4g}"


_CAPPED = Variant("capped", {"forward": _forward, "extra_repr": _describe})
