"""The front of a plan as a picture: tokens/s of a GPU over tokens/s of a user."""

from collections.abc import Callable, Sequence
from html import escape
from math import floor, log10

from rankwright.planner.plan import ParetoPoint

# Pixels.
_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 45
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#b8a800")


def pareto_svg(points: Sequence[ParetoPoint]) -> str:
    """Return the picture, with a colour a split; a point says its figures when pointed at."""
    most_user = max(point.tokens_per_s_per_user for point in points)
    most_gpu = max(point.tokens_per_s_per_gpu for point in points)
    labels = list(dict.fromkeys(point.label for point in points))
    colours = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(labels)}

    def place(user: float, gpu: float) -> tuple[float, float]:
        x = _LEFT + user / most_user * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - gpu / most_gpu * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    spots = [place(one.tokens_per_s_per_user, one.tokens_per_s_per_gpu) for one in points]
    line = " ".join(f"{x},{y}" for x, y in spots)
    parts = [
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" font-family="system-ui, sans-serif" '
        'font-size="11" fill="currentColor">',
        *_axis(most_user, most_gpu, place),
        f'<polyline points="{line}" fill="none" stroke="#8888"/>',
    ]
    for point, (x, y) in zip(points, spots, strict=True):
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="4" fill="{colours[point.label]}"><title>'
            f"{escape(point.describe())}</title></circle>"
        )
    for row, label in enumerate(labels[:10]):
        y = _TOP + 14 * row
        parts.append(
            f'<rect x="{_WIDTH - 150}" y="{y - 8}" width="9" height="9" fill="{colours[label]}"/>'
            f'<text x="{_WIDTH - 136}" y="{y}">{escape(label)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def _axis(
    most_user: float, most_gpu: float, place: Callable[[float, float], tuple[float, float]]
) -> list[str]:
    parts: list[str] = []
    for value in _ticks(most_user):
        x, y = place(value, 0.0)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{y}" stroke="#8883"/>')
    for value in _ticks(most_gpu):
        x, y = place(0.0, value)
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
        parts.append(f'<line x1="{x}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="#8883"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">tokens/s a user</text>'
    )
    parts.append(
        f'<text x="14" y="{_HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {_HEIGHT / 2})">tokens/s a GPU</text>'
    )
    return parts


def _ticks(most: float) -> list[float]:
    """Return round values from 0 to `most`, four to eight of them.

    >>> _ticks(37)
    [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0]
    """
    step = 10.0 ** floor(log10(most))
    if most / step < 2:
        step /= 5
    elif most / step < 4:
        step /= 2
    return [round(index * step, 10) for index in range(int(most / step) + 1)]
