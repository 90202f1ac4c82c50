"""Float values of a model from before its channels were scaled, to give them back to the bit."""

from torch import Tensor

from tuner.model import InstrumentedModel
from tuner.recovery.caps import uncap
from tuner.recovery.chains import Chain


class FloatValues:
    """Keeps what chains had when they were first kept: parameters, and the caps of ReLU6.

    Scaling exchanges tensors and leaves the old ones as they are, so nothing is copied but caps.
    """

    def __init__(self, model: InstrumentedModel) -> None:
        self._model = model
        self._parameters: dict[str, Tensor] = {}
        self._caps: dict[str, Tensor | None] = {}

    def keep(self, chain: Chain) -> None:
        """Keep the values of a chain as they are; those of another one before it stay kept."""
        root = self._model.model
        for path in (chain.producer, *chain.consumers):
            for name, parameter in root.get_submodule(path).named_parameters(path, recurse=False):
                self._parameters.setdefault(name, parameter.data)
        for path in chain.caps:
            caps = root.get_submodule(path)._buffers.get("cap")
            self._caps.setdefault(path, None if caps is None else caps.clone())

    def give_back(self) -> None:
        """Put all kept values on the model; no plan may be on."""
        root = self._model.model
        for name, value in self._parameters.items():
            root.get_parameter(name).data = value
        self._model.weights.replace_originals(self._parameters)
        for path, caps in self._caps.items():
            if caps is None:
                uncap(root.get_submodule(path))
            else:
                root.get_submodule(path).get_buffer("cap").copy_(caps)
