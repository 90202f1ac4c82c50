"""How numbers read in a report."""

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_NONE = "–"


def number(value: float | None) -> str:
    """Return five significant digits."""
    return _NONE if value is None else f"{value:.5g}"


def percent(ratio: float | None) -> str:
    """Return a ratio as a percentage of three significant digits."""
    return _NONE if ratio is None else f"{_three_digits(100 * ratio)} %"


def count(value: float | None) -> str:
    """Return a count with a unit prefix: 1.23 M."""
    if value is None:
        return _NONE
    unit, prefix = next((step for step in _PREFIXES if abs(value) >= step[0]), (1.0, ""))
    return f"{_three_digits(value / unit)} {prefix}".rstrip()


def size(value: float | None) -> str:
    """Return bytes with a binary unit: 1.23 MiB."""
    if value is None:
        return _NONE
    unit, name = next((step for step in _BYTES if abs(value) >= step[0]), (1, "B"))
    return f"{_three_digits(value / unit)} {name}"


def seconds(value: float) -> str:
    """Return a duration: 0.42 s, 12 s, 3 min 5 s, 2 h 4 min."""
    if value < 10:
        return f"{value:.2g} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shape(value: tuple[int, ...]) -> str:
    """Return a shape: 64×3×3×3."""
    return "×".join(map(str, value)) or _NONE


def _three_digits(value: float) -> str:
    """Return three significant digits, without an exponent for what is large."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
