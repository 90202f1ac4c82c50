"""Every weight scheme of the presets, on the weights of small networks that it is meant for."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tests.tuner.nets import ConvNet, Functional, Transposed, seeded
from tests.tuner.recovery.problems import correlated, normal, watched
from tuner.presets import preset_candidates
from tuner.recovery.rounding_matrix import as_matrix
from tuner.schemes import TensorScheme

PRESETS = ("int8", "int4-weight-only", "mixed-int", "fp8", "mx", "everything")
_INPUTS: dict[type[nn.Module], Tensor] = {
    ConvNet: normal(0, 2, 1, 8, 8),
    Functional: normal(0, 2, 5, 16),
    Transposed: normal(0, 2, 3, 9),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A weight, second moments that fit it, its axis of output channels and a scheme."""

    weight: Tensor
    second: Tensor
    axis: int
    scheme: TensorScheme


@cache
def cases() -> tuple[Case, ...]:
    """Return a case for each weight of each network and each scheme that a preset has for it."""
    found: dict[tuple[str, str, str], Case] = {}
    for net, x in _INPUTS.items():
        model = seeded(net)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for op in watched(model, x)[0].values():
            groups = getattr(dict(model.named_modules()).get(op.name), "groups", 1)
            for ref in op.weights:
                weight = ref.of(model.get_parameter(ref.path)).detach()
                second = correlated(1, groups, as_matrix(weight, groups, ref.axis).shape[-1])
                for preset in PRESETS:
                    for candidate in preset_candidates(preset, op, shapes):
                        scheme = candidate.config.weight
                        assert scheme is not None
                        key = net.__name__, op.name, scheme.model_dump_json()
                        found[key] = Case(weight, second, ref.axis, scheme)
    return tuple(found.values())


def others() -> tuple[Case, ...]:
    """Return formats and granularities that no preset has."""
    weight = normal(3, 6, 40)
    second = correlated(1, 1, 40)
    schemes = (
        TensorScheme(format="uint3", symmetric=False),
        TensorScheme(format="int4", granularity={"kind": "per_group", "size": 15, "axis": -1}),
        TensorScheme(format="int4", granularity={"kind": "per_group", "size": 4, "axis": 0}),
        TensorScheme(format="int4", granularity={"kind": "per_channel", "axis": 1}),
        TensorScheme(format="int4", granularity={"kind": "per_token"}),
        TensorScheme(format="int4", granularity={"kind": "per_block", "size": 16}),
        TensorScheme(format="int5", power_of_two_scale=True, narrow=True),
        *(TensorScheme(format=name) for name in ("nf4", "abfp4", "mxint8", "bf16", "fp16", "fp32")),
        *(TensorScheme(format=name) for name in ("mxfp6_e3m2", "e2m1", "e5m2_overflow", "e3m0")),
    )
    return tuple(Case(weight, second, 0, scheme) for scheme in schemes)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Return the case with a weight of another dtype."""
    return Case(case.weight.to(dtype), case.second, case.axis, case.scheme)
