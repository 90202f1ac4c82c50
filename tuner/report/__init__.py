"""The self-contained HTML report of one tuning run."""

from tuner.report.page import write

__all__ = ["write"]
