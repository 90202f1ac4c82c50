"""How one tensor is quantized (TensorScheme) and how one op is (OpConfig)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tuner import formats
from tuner.granularity import Granularity, PerBlock, PerTensor, PerToken
from tuner.repairs import BIAS_CORRECTION, Repair, in_order, rounding_of

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


_BLOCKS: dict[int, PerBlock] = {}
"""Made when a scheme is, because torch.compile cannot trace how pydantic makes them."""

_INTEGER_ONLY = ("symmetric", "narrow", "reduce_range", "quant_min", "quant_max")


class TensorScheme(BaseModel):
    """How one tensor is quantized: format, granularity, zero point, range and calibration.

    `dynamic` takes the range from the tensor itself at run time; otherwise it is calibrated once:
    of an input or output per tensor or along one axis, in fit(), simulate() and sweep(). There
    PerChannel(axis) has a scale for each index of the axis, PerGroup(size, axis) for each run of
    them, PerBlock(size) for each run along the last axis; all other axes share these scales.
    (`tuner.calibrate` gives a group of one position its own.) The axis must keep its size.
    Block formats have a scale of their own for each block on the last axis, whatever the
    granularity says; fp16, bf16 and fp32 have no scale. `backward_format` rounds the gradient that
    flows back, scaled so that its largest magnitude fits. For integers only: `symmetric=False` has
    a zero point; `narrow` leaves out the most negative code; `reduce_range` drops one bit of range;
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
    def _fits_the_format(self) -> "TensorScheme":
        fmt = formats.get(self.format)
        if fmt.kind != "int" or fmt.block is not None:
            self._refuse(_INTEGER_ONLY, f"{self.format} has no zero point and no range of codes")
        if fmt.kind == "int":
            self._check_codes(fmt)
        if fmt.block is not None:
            _BLOCKS.setdefault(fmt.block.size, PerBlock(fmt.block.size))
            self._refuse(
                ("calibration", "power_of_two_scale"),
                f"{self.format} takes the scale of a block from its largest magnitude",
            )
        if fmt.block is None or fmt.block.scale != "e8m0":
            self._refuse(("scale_rounding",), f"{self.format} has no E8M0 scale to round")
        return self

    def _refuse(self, fields: tuple[str, ...], why: str) -> None:
        for name in fields:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{why}: leave {name} at {default!r}, got {value!r}")

    def _check_codes(self, fmt: formats.Format) -> None:
        low, high = self.quant_range
        full_low, full_high = fmt.int_range
        if not full_low <= low < high <= full_high:
            raise ValueError(
                f"quant_min={low} and quant_max={high} do not fit {self.format}: "
                f"choose {full_low} <= quant_min < quant_max <= {full_high}"
            )

    @property
    def bits(self) -> int:
        """The storage width of one value."""
        return formats.get(self.format).bits

    @property
    def quant_range(self) -> tuple[int, int]:
        """The smallest and largest integer code that this scheme uses.

        `reduce_range` halves both ends; `narrow` drops the most negative code, as block formats of
        integers do; what `quant_min` and `quant_max` say comes last.
        """
        fmt = formats.get(self.format)
        low, high = fmt.int_range
        if self.reduce_range:
            low, high = (low // 2, high // 2)
        if fmt.signed and (self.narrow or fmt.block is not None):
            low += 1
        low = low if self.quant_min is None else self.quant_min
        high = high if self.quant_max is None else self.quant_max
        return low, high

    @property
    def reach(self) -> Granularity:
        """The granularity of the scales: that of a block format, else the scheme's own."""
        block = formats.get(self.format).block
        return self.granularity if block is None else _BLOCKS[block.size]

    @property
    def is_dynamic(self) -> bool:
        """Whether scales come from the tensor at run time (per token and block they always do)."""
        per_token = isinstance(self.granularity, PerToken)
        return self.dynamic or per_token or formats.get(self.format).block is not None

    @property
    def needs_range(self) -> bool:
        """Whether a range must be known before a tensor can be quantized."""
        return formats.get(self.format).scaled and not self.is_dynamic


class OpConfig(BaseModel):
    """The schemes of one op: weight, inputs (one for all, or one each), output and bias.

    `recovery` names the repairs of the op (see `tuner.repairs`), as `"gptq"` or
    `{"name": "smoothquant", "alpha": 0.5}`; they are kept in the order in which they are applied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: TensorScheme | None = None
    inputs: TensorScheme | tuple[TensorScheme | None, ...] | None = None
    output: TensorScheme | None = None
    bias: TensorScheme | None = None
    recovery: tuple[str | Repair, ...] = ()

    @field_validator("recovery")
    @classmethod
    def _known_repairs(cls, given: tuple[str | Repair, ...]) -> tuple[str | Repair, ...]:
        return in_order(given)

    @classmethod
    def float(cls) -> "OpConfig":
        """Return the fall-back to FP32: nothing of the op is quantized."""
        return cls()

    @property
    def rounding(self) -> str | None:
        """The repair that says how the weight is rounded, None where it is to nearest."""
        return rounding_of(self.recovery)

    @property
    def corrects_bias(self) -> bool:
        """Whether the bias makes up for the mean error of the weight."""
        return BIAS_CORRECTION in self.recovery

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
