"""Accuracy-driven quantization of PyTorch models."""

from tuner import formats, quantization
from tuner.calibrate import calibrate
from tuner.config import Rule, SearchSpace, TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.errors import (
    CalibrationWarning,
    NothingQuantizedWarning,
    TunerError,
    TuningCancelled,
)
from tuner.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from tuner.plan import Plan
from tuner.qparams import QParams, compute_qparams, dequantize, fake_quantize, quantize
from tuner.quantized_model import QuantizedModel
from tuner.records import TrialRecord
from tuner.results import TuningResult
from tuner.schemes import OpConfig, TensorScheme
from tuner.version import VERSION as __version__

__all__ = [
    "AccuracyGoal",
    "CalibrationWarning",
    "NothingQuantizedWarning",
    "OpConfig",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Plan",
    "QParams",
    "QuantizedModel",
    "Rule",
    "SearchSpace",
    "TensorScheme",
    "TrialRecord",
    "TunerError",
    "TuningCancelled",
    "TuningConfig",
    "TuningResult",
    "__version__",
    "calibrate",
    "compute_qparams",
    "dequantize",
    "fake_quantize",
    "formats",
    "quantization",
    "quantize",
]
