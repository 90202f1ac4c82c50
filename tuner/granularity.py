"""Over which part of a tensor one scale reaches."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Granularity(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _given(size: int | None) -> dict[str, int]:
    """Leave out a size that is missing: pydantic says so, also where it reads JSON."""
    return {} if size is None else {"size": size}


class PerTensor(_Granularity):
    """One scale for the whole tensor."""

    kind: Literal["per_tensor"] = "per_tensor"


class PerChannel(_Granularity):
    """One scale for each index of `axis`."""

    kind: Literal["per_channel"] = "per_channel"
    axis: int = 0

    def __init__(self, /, axis: int = 0, **data: Any) -> None:
        super().__init__(**{"axis": axis, **data})


class PerGroup(_Granularity):
    """One scale for each run of `size` values along `axis`; the last group may be shorter.

    Each position of the other axes has groups of its own; those of a static input or output are
    shared by all positions, whose number may change.
    """

    kind: Literal["per_group"] = "per_group"
    size: int = Field(gt=0)
    axis: int = -1

    def __init__(self, /, size: int | None = None, axis: int = -1, **data: Any) -> None:
        super().__init__(**_given(size), **{"axis": axis, **data})


class PerToken(_Granularity):
    """One scale for each vector along the last axis."""

    kind: Literal["per_token"] = "per_token"


class PerBlock(_Granularity):
    """One scale for each run of `size` values along the last axis, as block formats have it."""

    kind: Literal["per_block"] = "per_block"
    size: int = Field(gt=0)

    def __init__(self, /, size: int | None = None, **data: Any) -> None:
        super().__init__(**_given(size), **data)


Granularity = Annotated[
    PerTensor | PerChannel | PerGroup | PerToken | PerBlock, Field(discriminator="kind")
]
