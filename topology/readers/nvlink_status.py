"""Reads `nvidia-smi nvlink --status`: the speed of every NVLink of every GPU."""

import re
from dataclasses import dataclass
from itertools import pairwise

from rankwright.topology.readers.text import numbered_lines, refusal

_GPU = re.compile(r"\s*GPU (\d{1,3}): (.+?)(?: +\(UUID: ([\w-]+(?:\.\.\.)?)\))?\s*$")
_LINK = re.compile(r"\s*Link (\d{1,2}): (\d{1,4}(?:\.\d+)? GB/s|<?inactive>?)\s*$", re.IGNORECASE)
_LINK_LIKE = re.compile(r"\s*Link\s*\d")
# What the driver says instead of links: all inactive, not supported, or hidden by MIG.
_MESSAGE = re.compile(r"\s*((?:\S.*)?nvlink.*)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class NvlinkGpu:
    """NVLinks of one GPU: speed as printed by link, or the driver's message in their place."""

    index: int
    name: str
    links: tuple[tuple[int, str], ...]
    message: str | None


def is_nvlink_status(text: str) -> bool:
    """Return whether the text lists links (or their lack) below GPUs."""
    lines = [line for _, line in numbered_lines(text)]
    return any(
        _GPU.match(above) and (_LINK_LIKE.match(below) or _MESSAGE.match(below))
        for above, below in pairwise(lines)
    )


def parse_nvlink_status(text: str) -> tuple[NvlinkGpu, ...]:
    """Return the GPUs in the text with their links.

    Raises:
        ProbeError: A link belongs to no GPU, is listed twice, or cannot be read, or one is missing.
        ValueError: There is no such listing.
    """
    gpus: list[NvlinkGpu] = []
    is_open = False  # whether links may follow
    for number, line in numbered_lines(text):
        gpu = _GPU.match(line)
        if gpu is not None:
            if gpu[2].count("(") != gpu[2].count(")"):
                raise refusal(number, line, "the line is cut")
            if any(other.index == int(gpu[1]) for other in gpus):
                raise refusal(number, line, f"GPU {gpu[1]} is listed twice")
            gpus.append(NvlinkGpu(int(gpu[1]), gpu[2], (), None))
            is_open = True
        elif _LINK_LIKE.match(line):
            link = _LINK.match(line)
            if link is None or not is_open:
                raise refusal(number, line, "expected `Link N: X GB/s` below a GPU")
            last = gpus[-1]
            if last.message is not None or int(link[1]) in dict(last.links):
                raise refusal(number, line, f"a second word on link {link[1]}")
            if last.links and int(link[1]) != last.links[-1][0] + 1:
                raise refusal(number, line, f"link {last.links[-1][0]} goes before: lines are cut")
            links = (*last.links, (int(link[1]), link[2]))
            gpus[-1] = NvlinkGpu(last.index, last.name, links, None)
        elif is_open and re.search(r"\w", line):
            last = gpus[-1]
            message = _MESSAGE.match(line)
            if message is not None and not last.links and last.message is None:
                gpus[-1] = NvlinkGpu(last.index, last.name, (), message[1].strip())
            is_open = False
    if not any(gpu.links or gpu.message for gpu in gpus):
        raise ValueError(
            "no NVLinks in the text; expected the output of `nvidia-smi nvlink --status`"
        )
    return tuple(gpus)
