"""Quantized weights on a model: swapped in by storage, kept per (weight, scheme)."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tuner.errors import PlanError
from tuner.ops import WeightRef
from tuner.packed_tensor import StoredTensor, pack_current, stored_qparams
from tuner.qparams import compute_qparams, fake_quantize, whole_scale
from tuner.schemes import TensorScheme

_Key = tuple[str, tuple[int, int] | None]
_Choice = tuple[TensorScheme, str | None]
"""A scheme, and a rounding of `repairs.ROUNDINGS` or None: to nearest."""

Rounded = Callable[[WeightRef, Tensor, TensorScheme, str], Tensor]
"""Rounds a weight by a scheme in the way that is named."""


class WeightStore:
    """Puts fake-quantized weights on a model's parameters.

    A parameter keeps its identity: only its storage (`.data`) is exchanged, so tied modules follow
    and state_dict keys stay. Quantized weights are cached, least recently used first out, within
    `max_bytes`.
    """

    def __init__(self, model: nn.Module, max_bytes: int = 2 << 30) -> None:
        self._parameters = dict(model.named_parameters())
        self._originals = {name: p.data for name, p in self._parameters.items()}
        self.rounder: Rounded | None = None
        self._schemes: dict[_Key, _Choice] = {}
        self._cache: OrderedDict[tuple[_Key, _Choice], Tensor] = OrderedDict()
        self._scales: dict[tuple[_Key, TensorScheme], Tensor] = {}
        self._adopted: dict[tuple[_Key, TensorScheme], StoredTensor] = {}
        self._cached_bytes = 0
        self._max_bytes = max_bytes

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is computed again when it is needed."""
        return {**self.__dict__, "_cache": OrderedDict(), "_cached_bytes": 0}

    def original(self, ref: WeightRef) -> Tensor:
        """Return the float weight that the reference names."""
        return ref.of(self._originals[ref.path])

    def adopt(
        self,
        ref: WeightRef,
        weight: Tensor,
        scheme: TensorScheme,
        packed: StoredTensor,
        rounding: str | None = None,
    ) -> None:
        """Take weights that were quantized before (a loaded plan) as they are, and their codes."""
        self._adopted[ref.key, scheme] = packed
        self._scales.pop((ref.key, scheme), None)
        target = ref.of(self._parameters[ref.path].data)
        target.copy_(weight.to(target.dtype))
        self._schemes[ref.key] = scheme, rounding

    def packed(self, ref: WeightRef, scheme: TensorScheme) -> StoredTensor | None:
        """Return the codes that `adopt` was given, or None if the float weight is here."""
        return self._adopted.get((ref.key, scheme))

    def scheme(self, ref: WeightRef) -> TensorScheme | None:
        """Return the scheme that is on a weight, None where it is float."""
        choice = self._schemes.get(ref.key)
        return None if choice is None else choice[0]

    def stored(self, ref: WeightRef) -> StoredTensor:
        """Return the parts that a quantized weight is stored as, as it is on the model now."""
        scheme, rounding = self._schemes[ref.key]
        known, original = self.packed(ref, scheme), self.original(ref)
        # what was rounded otherwise than to nearest keeps the scales of the float weight
        given = known is None and rounding is not None
        qparams = compute_qparams(original, scheme) if given else None
        return pack_current(ref.of(self._parameters[ref.path]), original, scheme, qparams, known)

    def scales(self, ref: WeightRef, scheme: TensorScheme) -> Tensor:
        """Return the scales of a weight under a scheme, a global scale multiplied in."""
        key = ref.key, scheme
        if key not in self._scales:
            packed = self.packed(ref, scheme)
            if packed is None:
                qparams = compute_qparams(self.original(ref), scheme)
            else:
                qparams = stored_qparams(packed, scheme)
            self._scales[key] = torch.as_tensor(whole_scale(qparams))
        return self._scales[key]

    def set(self, ref: WeightRef, scheme: TensorScheme | None, rounding: str | None = None) -> None:
        """Quantize a weight by a scheme, or give it its float values back."""
        key = ref.key
        choice = None if scheme is None else (scheme, rounding)
        if self._schemes.get(key) == choice:
            return
        if choice is None:
            del self._schemes[key]
        else:
            self._schemes[key] = choice
        value = self.original(ref) if scheme is None else self.quantized(ref, scheme, rounding)
        self._put(ref, value)

    def _put(self, ref: WeightRef, value: Tensor) -> None:
        parameter = self._parameters[ref.path]
        if value.device != parameter.device or value.dtype != parameter.dtype:
            value = value.to(parameter.device, parameter.dtype)
        if ref.rows is None:
            parameter.data = value
            return
        original = self._originals[ref.path]
        if not any(path == ref.path for path, _ in self._schemes):
            parameter.data = original.to(parameter.device, parameter.dtype)
            return
        if parameter.data_ptr() == original.data_ptr():
            parameter.data = original.clone()
        ref.of(parameter.data).copy_(value)

    def quantized(
        self, ref: WeightRef, scheme: TensorScheme, rounding: str | None = None
    ) -> Tensor:
        """Return the fake-quantized weight, computed once while the cache holds it."""
        key = ref.key, (scheme, rounding)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        with torch.no_grad():
            value = self._rounded(ref, scheme, rounding)
        self._cache[key] = value
        self._cached_bytes += value.nbytes
        while self._cached_bytes > self._max_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
        return value

    def _rounded(self, ref: WeightRef, scheme: TensorScheme, rounding: str | None) -> Tensor:
        weight = self.original(ref)
        if rounding is None:
            return fake_quantize(weight, scheme)
        if self.rounder is None:
            raise PlanError(
                f"{ref.path!r}: the plan rounds this weight by {rounding}, which takes calibration "
                "data: let fit() find the plan, or leave the recovery out"
            )
        return self.rounder(ref, weight, scheme, rounding)

    def forget_cache(self) -> None:
        """Let go of quantized weights that are not on the model now."""
        self._cache.clear()
        self._cached_bytes = 0

    def replace_originals(self, values: Mapping[str, Tensor]) -> None:
        """Take new float values as the weights to quantize from; no scheme may be on.

        Parameters that the store does not know, such as the bias that folding gave a layer, have no
        weights to quantize.
        """
        for name in values.keys() & self._parameters.keys():
            self._originals[name] = values[name]
            self._parameters[name].data = values[name]
        self._scales.clear()
        self.forget_cache()
