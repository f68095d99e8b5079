"""Figures as people write them."""

from math import floor, isfinite, log10


def figure(value: float, digits: int = 4) -> str:
    """Return `value` to so many digits, its thousands apart, and never with an exponent.

    >>> figure(27409.3), figure(364908.1, 5), figure(0.59249, 3), figure(98.0)
    ('27,409', '364,908', '0.592', '98')
    """
    if not isfinite(value) or value == 0:
        return f"{value:g}"
    places = max(0, digits - 1 - floor(log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places else text
