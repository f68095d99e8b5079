"""Shapes and colours of our pictures, as SVG elements."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

from rankwright.link_classes import LINK_CLASSES, OTHER

# Pixels.
BAR = 20  # height
CHARACTER = 6.3  # mean width at 11 pixels, in the fonts that the picture names

_LIGHT = {
    "paper": "#ffffff",
    "box": "#f6f7f9",
    "edge": "#c3c9d1",
    "ink": "#1b1f24",
    "dim": "#57606a",
}
_DARK = {
    "paper": "#0f1419",
    "box": "#1a2027",
    "edge": "#46505c",
    "ink": "#e8eaed",
    "dim": "#a2acb7",
}


@dataclass(slots=True)
class Canvas:
    """SVG elements, where each machine begins and ends, and how far all reaches."""

    parts: list[str] = field(default_factory=list[str])
    machines: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    width: float = 0
    height: float = 0

    def add(self, element: str, right: float = 0, bottom: float = 0) -> None:
        """Append an element that reaches so far."""
        self.parts.append(element)
        self.width, self.height = max(self.width, right), max(self.height, bottom)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        kind: str = "ink",
        size: int = 11,
        anchor: str = "start",
    ) -> None:
        """Write words; sizes above 11 are headings."""
        weight = ' font-weight="600"' if size > 11 else ""
        self.add(
            f'<text x="{x:g}" y="{y:g}" class="rw-{kind}" font-size="{size}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>',
            x + len(words) * CHARACTER * size / 11 if anchor == "start" else 0,
            y,
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str) -> None:
        """Draw a rounded rectangle that says `title` when pointed at."""
        self.add(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'class="{kind}"><title>{escape(title)}</title></rect>',
            x + width,
            y + height,
        )

    def bar(self, left: float, right: float, y: float, kind: str, words: str, title: str) -> None:
        """Draw a thing that several others hang on, with its name inside."""
        room = (len(words) * CHARACTER + 16 - (right - left)) / 2
        left, right = (left - room, right + room) if room > 0 else (left, right)
        self.box(left, y, right - left, BAR, f"rw-bar rw-{kind}", title)
        self.text((left + right) / 2, y + 14, words, anchor="middle")

    def line(self, x: float, top: float, bottom: float, kind: str) -> None:
        """Draw a vertical link."""
        self.add(f'<path d="M{x:g} {top:g}V{bottom:g}" class="rw-link rw-{kind}"/>')


def styles() -> str:
    """Return the style sheet: light, and dark where the reader asks for it."""

    def rules(colours: dict[str, str], links: Iterable[tuple[str, str]]) -> str:
        found = [
            f".rw-paper{{fill:{colours['paper']}}}",
            f".rw-box{{fill:{colours['box']};stroke:{colours['edge']}}}",
            f".rw-frame{{fill:none;stroke:{colours['edge']};stroke-dasharray:4 3}}",
            f".rw-gpu{{fill:{colours['paper']};stroke:{colours['edge']};stroke-width:1.5}}",
            f".rw-ink{{fill:{colours['ink']}}}",
            f".rw-dim{{fill:{colours['dim']}}}",
        ]
        for name, colour in links:
            found.append(f".rw-{name}{{stroke:{colour}}}.rw-bar.rw-{name}{{fill:{colour}}}")
        return "".join(found)

    classes = (*LINK_CLASSES, OTHER)
    light = rules(_LIGHT, [*((one.name, one.light) for one in classes), ("network", "#7e22ce")])
    dark = rules(_DARK, [*((one.name, one.dark) for one in classes), ("network", "#c084fc")])
    fixed = ".rw-bar{fill-opacity:.16}.rw-link{fill:none;stroke-width:1.6;stroke-linecap:round}"
    warned = ".rw-warned{stroke-width:2.5}"
    return f"{light}{fixed}{warned}@media (prefers-color-scheme:dark){{{dark}}}"
