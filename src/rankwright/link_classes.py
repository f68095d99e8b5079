"""What a link is worth at a glance: classes of link tokens, with their colours and meaning."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkClass:
    """Links that are alike to the reader.

    Args:
        name: Word for CSS classes.
        pattern: Regular expression of its tokens.
        style: Of the terminal, as rich has it.
        light: Colour on white paper.
        dark: Colour on black paper.
        meaning: A few words.
    """

    name: str
    pattern: str
    style: str
    light: str
    dark: str
    meaning: str


# Best links first. The PCIe tokens are explained at the foot of `nvidia-smi topo -m`. Colours reach
# the contrast of 3 to 1 that WCAG 2.1 asks of graphics, on the papers of `cluster_svg.py`.
LINK_CLASSES = (
    LinkClass("direct", r"NV\d+|XGMI", "bold green", "#15803d", "#4ade80", "NVLink or xGMI"),
    LinkClass("memory", r"SHM", "green", "#4d7c0f", "#a3e635", "memory of this machine"),
    LinkClass("switch", r"PIX|PXB", "cyan", "#0369a1", "#38bdf8", "PCIe switches only"),
    LinkClass("host", r"PHB|NODE", "yellow", "#a16207", "#facc15", "through a CPU"),
    LinkClass("socket", r"SYS|SOC", "red", "#b91c1c", "#f87171", "between CPU sockets"),
)
OTHER = LinkClass("other", r".*", "dim", "#6b7280", "#9ca3af", "unknown")


def link_class(token: str) -> LinkClass:
    """Return the class of a link token.

    >>> link_class("NV18").meaning
    'NVLink or xGMI'
    """
    return next((one for one in LINK_CLASSES if re.fullmatch(one.pattern, token)), OTHER)
