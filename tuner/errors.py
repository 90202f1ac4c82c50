"""The library's one error tree: everything raised on purpose derives from TunerError."""

from collections.abc import Iterable
from difflib import get_close_matches


class TunerError(Exception):
    """Something that the tuner was asked for cannot be done."""


_HEAD, _TAIL = 400, 600  # characters; between them are command lines, dispatch tables and stacks


def brief(error: Exception | str) -> str:
    """Return the type of another library's exception and what it says, or that alone.

    Of long texts it is the beginning and the end; the whole of it stays with the exception, which
    is the cause of the one that is raised.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = text.strip()
    if len(text) <= _HEAD + _TAIL:
        return text
    return f"{text[:_HEAD].rstrip()} […] {text[-_TAIL:].lstrip()}"


class UnknownNameError(TunerError, ValueError):
    """A name that no table knows; the message lists the near ones."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(str(name), names, n=4, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(names)}."
        super().__init__(f"unknown {kind} {name!r}. {hint}")


class UnsupportedError(TunerError):
    """Asked for by a valid name, but this version does not do it yet."""


class SchemeError(TunerError, ValueError):
    """A scheme, scale or zero point does not fit the tensor that it is put on."""


class DataError(TunerError):
    """The calibration data cannot be used: empty, of a wrong type, or refused by the model."""


class ModelError(TunerError):
    """The model cannot be tuned as it is."""


class SpaceError(TunerError):
    """The search space does not fit the model: a rule matches nothing, or an op has no option."""


class PlanError(TunerError, ValueError):
    """A plan does not fit the model that it is put on, or is not well formed."""


class EvaluationError(TunerError):
    """`eval_func` raised, or returned something that is no score."""


class StorageError(TunerError):
    """A study cannot be stored, or a stored one cannot be resumed."""


class StudyMismatchError(StorageError):
    """A stored study was made with another model, space, strategy or seed."""


class SaveError(TunerError):
    """A model directory cannot be written or read."""


class ExportError(TunerError):
    """A model cannot be exported, or what was exported does not agree with it."""


class NothingQuantizedWarning(UserWarning):
    """The goal is met only by the FP32 model: nothing was quantized."""


class CalibrationWarning(UserWarning):
    """Calibration data held values that had to be left out."""


class TuningCancelled(TunerError):
    """Raise it in a callback or in `eval_func` to end the search; the best so far is returned."""
