"""One forward and backward that keeps what every op took and how much its output matters."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tuner.ops import Operand
from tuner.sites import Call, Site
from tuner.tensors import map_tensors, named_tensors_in, tensors_in

_SIDE_OUTPUTS = ("past_key_values", "hidden_states", "attentions", "cross_attentions")


@dataclass(eq=False)
class CapturedCall:
    """One call of an op, its operands kept, and the loss gradient at its output.

    The gradient is None where none could be had.
    """

    call: Call
    autocast: tuple[str, torch.dtype] | None = None
    gradient: Tensor | None = None

    def replay(self, operand: Operand) -> Any:
        """Compute the call again, under the autocast that it ran under."""
        if self.autocast is None:
            return self.call.invoke(operand)
        device, dtype = self.autocast
        with torch.autocast(device, dtype):
            return self.call.invoke(operand)


class Capture:
    """A tap that keeps the calls of the wanted ops, and their output gradients on backward."""

    def __init__(self, wanted: Collection[str]) -> None:
        self.calls: dict[str, list[CapturedCall]] = {}
        self._wanted = wanted

    def run(self, site: Site, call: Call) -> Any:
        """Compute the call, keep its operands, and listen for its output's gradient."""
        site.calls += 1
        if site.name not in self._wanted:
            return call.invoke(_same)
        kept = CapturedCall(
            replace(
                call,
                args=map_tensors(_kept, call.args),
                kwargs=map_tensors(_kept, dict(call.kwargs)),
            ),
            _autocast((call.args, call.kwargs)),
        )
        self.calls.setdefault(site.name, []).append(kept)
        output = call.invoke(_same)
        if isinstance(output, Tensor):
            return _listened(output, kept)
        return type(output)((_heard(output[0], kept), *output[1:]))

    def other(self, scope: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute any other call."""
        return fn(*args, **kwargs)


def _autocast(value: Any) -> tuple[str, torch.dtype] | None:
    device = next((tensor.device.type for tensor in tensors_in(value)), "cpu")
    if not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device)


def _same(index: int, x: Tensor) -> Tensor:
    return x


def _kept(tensor: Tensor) -> Tensor:
    """Keep a copy that later in-place ops do not change; parameters and their views stay."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return tensor
    return tensor.detach().clone()


def _heard(head: Any, kept: CapturedCall) -> Any:
    """Listen to the sequence that a recurrent layer returns, packed or not."""
    if isinstance(head, PackedSequence):
        return head._replace(data=_listened(head.data, kept))
    return _listened(head, kept)


def _listened(output: Tensor, kept: CapturedCall) -> Tensor:
    if not torch.is_grad_enabled() or not output.is_floating_point():
        return output
    if not output.requires_grad:
        output = output.detach().requires_grad_()

    def keep(gradient: Tensor) -> None:
        kept.gradient = gradient.detach()

    output.register_hook(keep)
    return output.clone()  # in-place ops after it must not touch a leaf


def surrogate_loss(
    output: Any, batch: Any, vocabularies: Collection[int], generator: torch.Generator
) -> Tensor | None:
    """Return a scalar whose gradients say what matters in the output, or None if none can be had.

    For logits: cross-entropy with labels sampled from the model's own distribution, so that
    E[g gᵀ] is the Fisher information (Kunstner et al., NeurIPS 2019, section 2). For any other
    float output: a random projection, scaled by the output's RMS, so that E[(g·Δ)²] is the
    relative squared error of the output.
    """
    named = [(n, t) for n, t in named_tensors_in(output) if t.requires_grad]
    main = [(n, t) for n, t in named if not n.startswith(_SIDE_OUTPUTS)] or named
    main = [(n, t) for n, t in main if n.rpartition(".")[2] == "logits"] or main
    losses = [_loss(name, t, batch, vocabularies, generator) for name, t in main]
    return torch.stack(losses).sum() if losses else None


def _loss(
    name: str, x: Tensor, batch: Any, vocabularies: Collection[int], generator: torch.Generator
) -> Tensor:
    x = x.float()
    if not _is_logits(name, x, batch, vocabularies):
        return _projection(x, batch, generator)
    if bool((x >= 0).all()) and torch.allclose(x.sum(-1), torch.ones(()).to(x), atol=1e-3):
        log_p = x.clamp_min(1e-12).log()
    else:
        log_p = torch.log_softmax(x, -1)
    flat = log_p.reshape(-1, log_p.shape[-1])
    noise = torch.rand(flat.shape, generator=generator).clamp_min(1e-20).to(flat.device)
    labels = (flat.detach() - (-noise.log()).log()).argmax(-1)  # Gumbel-max sampling
    return -flat.gather(1, labels[:, None]).sum()


def _is_logits(name: str, x: Tensor, batch: Any, vocabularies: Collection[int]) -> bool:
    """Return whether the last axis holds class scores."""
    if x.dim() < 2 or x.shape[-1] < 2:
        return False
    if name.rpartition(".")[2] == "logits":
        return True
    others = [t for _, t in named_tensors_in(batch) if not t.is_floating_point()]
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        targets = [t for _, t in named_tensors_in(batch[1:])]
        if any(not t.is_floating_point() and t.shape == x.shape[:-1] for t in targets):
            return True
        if any(t.is_floating_point() and t.shape == x.shape for t in targets):
            return False
    if x.dim() == 3:
        return x.shape[-1] in vocabularies and any(t.shape == x.shape[:-1] for t in others)
    norms = x.detach().norm(dim=-1)
    return x.dim() == 2 and not torch.allclose(norms, torch.ones_like(norms), atol=1e-3)


def _projection(x: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
    direction = torch.randn(x.shape, generator=generator).to(x.device)
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == x.shape[:2]:
        keep = mask.to(x.device) != 0
        direction = direction * keep.reshape(*mask.shape, *[1] * (x.dim() - 2))
    detached = x.detach() * (direction != 0)
    samples = max(x.shape[0], 1) if x.dim() else 1
    energy = detached.square().sum() / samples
    return (direction * x).sum() / energy.sqrt().clamp_min(1e-12)
