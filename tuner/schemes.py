"""How one tensor is quantized (TensorScheme) and how one op is (OpConfig)."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tuner import formats
from tuner.granularity import Granularity, PerTensor, PerToken

CalibrationMethod = Literal[
    "minmax",
    "ema",
    "percentile",
    "mse",
    "entropy",
    "aciq",
    "aciq_laplace",
    "aciq_gauss",
    "histogram",
]


class TensorScheme(BaseModel):
    """How one tensor is quantized: format, granularity, zero point, range and calibration.

    `dynamic` takes the range from the tensor itself at run time; otherwise it is calibrated once.
    `narrow` leaves out the most negative code; `reduce_range` drops one bit of range;
    `quant_min` and `quant_max` set the range of codes freely inside the format's own range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = "int8"
    granularity: Granularity = Field(default_factory=PerTensor)
    symmetric: bool = True
    narrow: bool = False
    dynamic: bool = False
    calibration: CalibrationMethod = "minmax"
    percentile: float = Field(default=99.99, gt=50.0, le=100.0)
    ema_decay: float = Field(default=0.99, ge=0.0, lt=1.0)
    reduce_range: bool = False
    quant_min: int | None = None
    quant_max: int | None = None
    power_of_two_scale: bool = False
    scale_rounding: Literal["floor", "ceil", "rceil", "even"] = "floor"
    backward_format: str | None = None

    @field_validator("format", "backward_format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name is not None:
            formats.get(name)
        return name

    @model_validator(mode="after")
    def _codes_fit(self) -> "TensorScheme":
        if formats.get(self.format).kind != "int":
            return self
        low, high = self.quant_range
        full_low, full_high = formats.get(self.format).int_range
        if not full_low <= low < high <= full_high:
            raise ValueError(
                f"quant_min={low} and quant_max={high} do not fit {self.format}: "
                f"choose {full_low} <= quant_min < quant_max <= {full_high}"
            )
        return self

    @property
    def bits(self) -> int:
        """The storage width of one value."""
        return formats.get(self.format).bits

    @property
    def quant_range(self) -> tuple[int, int]:
        """The smallest and largest integer code that this scheme uses.

        `reduce_range` halves both ends; `narrow` drops the most negative code;
        what `quant_min` and `quant_max` say comes last.
        """
        fmt = formats.get(self.format)
        low, high = fmt.int_range
        if self.reduce_range:
            low, high = (low // 2, high // 2)
        if self.narrow and fmt.signed:
            low += 1
        low = low if self.quant_min is None else self.quant_min
        high = high if self.quant_max is None else self.quant_max
        return low, high

    @property
    def is_dynamic(self) -> bool:
        """Whether the range is taken from the tensor at run time (per-token always is)."""
        return self.dynamic or isinstance(self.granularity, PerToken)


class OpConfig(BaseModel):
    """The schemes of one op: weight, inputs (one for all, or one each), output and bias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: TensorScheme | None = None
    inputs: TensorScheme | tuple[TensorScheme | None, ...] | None = None
    output: TensorScheme | None = None
    bias: TensorScheme | None = None
    recovery: tuple[str | dict[str, Any], ...] = ()

    @classmethod
    def float(cls) -> "OpConfig":
        """Return the fall-back to FP32: nothing of the op is quantized."""
        return cls()

    @property
    def is_float(self) -> bool:
        """Whether nothing of the op is quantized."""
        inputs = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        return not any((self.weight, self.output, self.bias, *inputs))

    def input_scheme(self, index: int) -> TensorScheme | None:
        """Return the scheme of the op's `index`-th input operand."""
        if isinstance(self.inputs, tuple):
            return self.inputs[index] if index < len(self.inputs) else None
        return self.inputs
