"""The factors under which the consumers of a chain are predicted to harm least.

An option of a consumer is computed as it would be after scaling, on calls that were captured
before: the input divided, quantized and multiplied again, the weight the other way round. Its
damage is that of `tuner.sensitivity`, ½ Σ (g·Δ)², so trying factors costs calls of single ops only.

Equalization takes the ranges of both weights (Nagel et al., ICCV 2019, section 4.1), SmoothQuant
those of activation and weight (Xiao et al., ICML 2023, section 4), AWQ the mean magnitude of the
activation (Lin et al., MLSys 2024, section 3.2): where only weights are quantized. Each is tried
with the channels as they are and, where biases can absorb them, without their constants.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from tuner.calibrators import calibrated_range
from tuner.capture import CapturedCall
from tuner.evenly import evenly
from tuner.gradients import Calls, output_errors
from tuner.model import InstrumentedModel
from tuner.ops import WeightRef
from tuner.qparams import fake_quantize
from tuner.quantizer import Quantizer
from tuner.ranges import qparams_from_range
from tuner.recovery.absorption import absorbed, shifts_between
from tuner.recovery.chains import Chain
from tuner.recovery.channels import ChannelStatistics
from tuner.recovery.layers import (
    channel_axis,
    input_magnitudes,
    on_input_channels,
    output_magnitudes,
)
from tuner.recovery.scales import equalize_scales, smooth_scales
from tuner.recovery.scaling import Scaling
from tuner.repairs import (
    AWQ,
    BIAS_ABSORPTION,
    EQUALIZATION,
    SCALINGS,
    SMOOTHQUANT,
    Repair,
    name_of,
)
from tuner.schemes import OpConfig, TensorScheme
from tuner.statistics import TensorStatistics
from tuner.tensors import head_of

ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
_ENOUGH = 1.05  # how many times less damage makes a repair worth its entry in the plan
_REFERENCES = 3  # options of an op that are looked at
_TINY = 1e-30
_HALF = (torch.float16, torch.bfloat16)

_Outputs = Mapping[str, Sequence[tuple[CapturedCall, Tensor]]]
"""Op → its captured calls, each with its float output."""

Configs = Mapping[str, Sequence[OpConfig]]
"""Op → the options that quantize it."""

Wanted = Sequence[str | Repair]
"""Repairs of `repairs.SCALINGS` that a rule asks for."""


@dataclass(frozen=True)
class ScaleSearch:
    """Finds the best factors of one chain at a time, on the model as it is scaled so far.

    `channels` are the statistics of each chain's tensor, by producer.
    """

    model: InstrumentedModel
    channels: Mapping[str, ChannelStatistics]
    calls: Calls
    configs: Configs
    allowed: tuple[str, ...] = SCALINGS

    def best(self, chain: Chain, wanted: Wanted | None = None) -> Scaling | None:
        """Return the scaling with the least damage, None where leaving the chain alone is as good.

        `wanted` is what the user asks for: then it is done, with the alpha given or the best one;
        None where it cannot be.
        """
        found = list(self._candidates(chain, wanted))
        configs = {
            name: evenly(self.configs.get(name, ()), _REFERENCES) for name in chain.consumers
        }
        if not found or not any(configs.values()):
            return None
        calls = {name: self._with_outputs(name) for name in configs}
        harms = [self._harm(scaling, configs, calls) for scaling in found]
        worth = [1.0 if scaling.shifts is None else _ENOUGH for scaling in found]
        best = min(range(len(found)), key=lambda i: harms[i] * worth[i])
        plain = Scaling(chain, EQUALIZATION, torch.ones(chain.channels, dtype=torch.float64))
        gain = self._harm(plain, configs, calls) / harms[best]
        is_enough = wanted is not None or gain > _ENOUGH
        return replace(found[best], gain=gain) if is_enough else None

    def _candidates(self, chain: Chain, wanted: Wanted | None) -> Iterator[Scaling]:
        names = self.allowed if wanted is None else tuple(map(name_of, wanted))
        statistics = self.channels[chain.producer]
        if wanted is None or BIAS_ABSORPTION not in names:
            yield from self._divisions(chain, wanted, statistics)
        is_useful = wanted is not None or self._has_inputs(chain)
        if BIAS_ABSORPTION not in names or not is_useful:
            return
        shifts = self._shifts(chain, statistics)
        if shifts is None:
            return
        columns = statistics.magnitudes.numel() // chain.channels
        moved = statistics.shifted(shifts.repeat_interleave(columns).float())
        if wanted is None or len(names) == 1:
            ones = torch.ones(chain.channels, dtype=torch.float64)
            yield Scaling(chain, BIAS_ABSORPTION, ones, shifts=shifts)
        for scaling in self._divisions(chain, wanted, moved):
            yield replace(scaling, shifts=shifts)

    def _divisions(
        self, chain: Chain, wanted: Wanted | None, statistics: ChannelStatistics
    ) -> Iterator[Scaling]:
        """Yield what a chain may be divided by, whose tensor has these statistics."""
        allowed = self.allowed if wanted is None else tuple(map(name_of, wanted))
        given = next((r.alpha for r in wanted or () if isinstance(r, Repair)), None)
        producer = self.model.model.get_submodule(chain.producer)
        columns = self._columns(chain)
        own = producer.get_parameter("weight").detach().cpu().double()
        if EQUALIZATION in allowed and own.dim() > 1:
            factors = equalize_scales(output_magnitudes(producer, own), columns)
            yield Scaling(chain, EQUALIZATION, self._exact(chain, factors))
        alphas = ALPHAS if given is None else (given,)
        if SMOOTHQUANT in allowed and (wanted or self._has_inputs(chain)):
            largest = statistics.magnitudes.view(chain.channels, -1).amax(1).double()
            for alpha in alphas:
                factors = smooth_scales(largest, columns, alpha)
                repair = Repair(name=SMOOTHQUANT, alpha=alpha)
                yield Scaling(chain, repair, self._exact(chain, factors))
        if AWQ in allowed and (wanted or not self._has_inputs(chain)):
            mean = statistics.means.view(chain.channels, -1).mean(1).double()
            for alpha in alphas:
                factors = smooth_scales(mean**alpha, torch.ones_like(mean), 1.0)
                repair = Repair(name=AWQ, alpha=alpha)
                yield Scaling(chain, repair, self._exact(chain, factors))

    def _shifts(self, chain: Chain, statistics: ChannelStatistics) -> Tensor | None:
        """Return the constants of the channels, None where they cannot go, or would be rounded."""
        if self._is_half(chain):
            return None
        low, high = (end.view(chain.channels, -1).double() for end in statistics.extremes)
        return shifts_between(chain.offset, low.amin(1), high.amax(1))

    def _has_inputs(self, chain: Chain) -> bool:
        """Return whether an option of a consumer quantizes the scaled tensor."""
        configs = (config for name in chain.consumers for config in self.configs.get(name, ()))
        return any(config.input_scheme(0) is not None for config in configs)

    def _columns(self, chain: Chain) -> Tensor:
        """Return the largest magnitude of all consumers' weights for each channel, `[channels]`."""
        found = []
        for path in chain.consumers:
            module = self.model.model.get_submodule(path)
            weight = module.get_parameter("weight").detach().cpu().double()
            found.append(input_magnitudes(module, weight).view(chain.channels, -1).amax(1))
        return torch.stack(found).amax(0)

    def _exact(self, chain: Chain, factors: Tensor) -> Tensor:
        """Return powers of two for half precision, where other factors would round."""
        return factors.log2().round().exp2() if self._is_half(chain) else factors

    def _is_half(self, chain: Chain) -> bool:
        """Return whether a chain has parameters of half precision, or runs under autocast."""
        paths = chain.producer, *chain.consumers
        weights = (self.model.model.get_submodule(path).get_parameter("weight") for path in paths)
        calls = (call for path in chain.consumers for call in self.calls.get(path, ()))
        is_half = any(weight.dtype in _HALF for weight in weights)
        return is_half or any(call.autocast is not None for call in calls)

    @torch.no_grad()
    def _with_outputs(self, name: str) -> list[tuple[CapturedCall, Tensor]]:
        """Return the captured calls of an op with what they give in float."""
        calls = self.calls.get(name, ())
        return [(call, head_of(call.replay(lambda i, x: x)).float()) for call in calls]

    @torch.no_grad()
    def _harm(self, scaling: Scaling, configs: Configs, calls: _Outputs) -> float:
        """Return the geometric mean of the damage of the options, on the captured calls."""
        logs = []
        statistics = self.channels[scaling.chain.producer]
        for name, options in configs.items():
            module = self.model.model.get_submodule(name)
            scaled = _ScaledOp(module, self._ref(name), scaling, statistics)
            for config in options:
                damage = sum(scaled.damage(*call, config) for call in calls[name])
                logs.append(math.log(damage + _TINY))
        return math.exp(sum(logs) / len(logs))

    def _ref(self, name: str) -> WeightRef:
        return self.model.ops[name].weights[0]


class _ScaledOp:
    """A consumer as it computes when the channels of its input are shifted and divided."""

    def __init__(
        self, module: nn.Module, ref: WeightRef, scaling: Scaling, channels: ChannelStatistics
    ) -> None:
        self._module = module
        self._parameter = module.get_parameter(ref.path.rpartition(".")[2])
        self._factors = scaling.input_factors(module).to(self._parameter.device)
        shifts = scaling.input_shifts(module)
        self._shifts = None if shifts is None else shifts.to(self._parameter.device)
        self._channels = channels
        axis = channel_axis(module)
        self._shape = (-1, *[1] * (-1 - axis))

    @cached_property
    def _statistics(self) -> TensorStatistics:
        """The statistics of the scaled input, which weights alone do not need."""
        moved = self._channels
        if self._shifts is not None:
            moved = moved.shifted(self._shifts.float().cpu())
        return moved.scaled(self._factors.float().cpu())

    def damage(self, captured: CapturedCall, reference: Tensor, config: OpConfig) -> float:
        """Return Σ (g·Δ)² of a configuration on one call, of which `reference` is the output."""
        inputs = config.input_scheme(0)
        quantizer = None if inputs is None else self._quantizer(inputs)
        whole = {p: p.data for p in self._module.parameters(recurse=False)}
        try:
            self._absorb()
            if config.weight is not None:
                self._parameter.data = self._weight(whole[self._parameter], config.weight)
            output = captured.replay(lambda i, x: self._input(x, quantizer) if i == 0 else x)
        finally:
            for parameter, value in whole.items():
                parameter.data = value
        errors = output_errors(reference, captured.gradient, [head_of(output).float()])
        return float(errors.square().sum())

    def _absorb(self) -> None:
        """Let the bias take over what the input loses."""
        if self._shifts is not None:
            bias, weight = self._module.get_parameter("bias"), self._parameter.data.double()
            bias.data = bias.data + absorbed(self._module, weight, self._shifts).to(bias.dtype)

    def _quantizer(self, scheme: TensorScheme) -> Quantizer:
        if not scheme.needs_range:
            return Quantizer(scheme)
        low, high = calibrated_range(self._statistics, scheme)
        return Quantizer(scheme, qparams_from_range(torch.tensor(low), torch.tensor(high), scheme))

    def _input(self, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        if self._shifts is not None:
            x = x - self._shifts.view(self._shape).to(x.dtype)
        if quantizer is None:
            return x
        factors = self._factors.view(self._shape).to(x.dtype)
        return quantizer(x / factors) * factors

    def _weight(self, weight: Tensor, scheme: TensorScheme) -> Tensor:
        scaled = on_input_channels(self._module, weight, self._factors.to(weight.dtype))
        rounded = fake_quantize(scaled, scheme)
        return on_input_channels(self._module, rounded, (1 / self._factors).to(weight.dtype))
