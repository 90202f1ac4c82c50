"""Corrected biases on a model: the mean error of a rounded weight, put back in the bias."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tuner.biases import bias_name
from tuner.errors import PlanError
from tuner.ops import Op
from tuner.schemes import OpConfig, TensorScheme

Correction = Callable[[Op, OpConfig], Tensor]
"""Returns what is added to the bias of an op under a configuration, `[out]`."""


@dataclass(frozen=True, eq=False)
class _Corrected:
    """A bias that is corrected; `original` is None where it was loaded so."""

    config: OpConfig
    original: Tensor | None


class BiasCorrections:
    """Adds corrections to the biases of a model, and takes them off.

    As with weights, a parameter keeps its identity: only its storage (`.data`) is exchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        self.correction: Correction | None = None
        self._model = model
        self._on: dict[str, _Corrected] = {}
        self._own: dict[str, bool] = {}
        self._shifts: dict[tuple[str, TensorScheme, str | None], Tensor] = {}

    def is_own(self, op: str) -> bool:
        """Return whether no other module has the bias of an op, which would be changed with it."""
        if op not in self._own:
            bias = self._model.get_parameter(bias_name(op))
            modules = self._model.modules()
            owners = (m for m in modules if id(bias) in map(id, m._parameters.values()))
            self._own[op] = sum(1 for _ in owners) == 1
        return self._own[op]

    def set(self, op: Op, config: OpConfig) -> None:
        """Correct the bias of an op as its configuration says, or give back its float values."""
        on = self._on.get(op.name)
        if on is not None and on.config == config:
            return
        if on is not None:
            del self._on[op.name]
            if on.original is not None:
                self._model.get_parameter(bias_name(op.name)).data = on.original
        if config.corrects_bias and config.weight is not None:
            self._refuse_shared(op)
            parameter = self._model.get_parameter(bias_name(op.name))
            self._on[op.name] = _Corrected(config, parameter.data)
            parameter.data = parameter.data + self.shift(op, config).to(parameter)

    def adopt(self, op: Op, config: OpConfig) -> None:
        """Take a bias as it is (a loaded plan): it was corrected before."""
        if config.corrects_bias:
            self._on[op.name] = _Corrected(config, None)

    def _refuse_shared(self, op: Op) -> None:
        if not self.is_own(op.name):
            raise PlanError(
                f"{op.name!r} shares its bias with another module, whose output a corrected one "
                "would change: leave bias_correction out for both"
            )

    def shift(self, op: Op, config: OpConfig) -> Tensor:
        """Return what is added to the bias of an op, `[out]`, computed once for each weight."""
        assert config.weight is not None
        if self.correction is None:
            raise PlanError(
                f"{op.name!r}: the plan corrects the bias, which takes calibration data: let fit() "
                "find the plan, or leave the recovery out"
            )
        key = op.name, config.weight, config.rounding
        if key not in self._shifts:
            self._shifts[key] = self.correction(op, config)
        return self._shifts[key]
