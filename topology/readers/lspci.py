"""Reads `lspci -tv`: the tree of PCI devices, with the GPUs and network adapters in it.

The tree has names and no classes, so that only adapters of vendors that make accelerators and RDMA
adapters are told apart. It shows which switch joins two devices, not which socket.
"""

import re
from dataclasses import dataclass

from rankwright.topology.readers.text import numbered_lines, refusal

_ROOT = re.compile(r"-\[([0-9a-fA-F]{4,8}:)?([0-9a-fA-F]{2})(?:-[0-9a-fA-F]{2})?\]-")
_BUS = re.compile(r"-\[(?:[0-9a-fA-F]{4,8}:)?([0-9a-fA-F]{2})(?:-[0-9a-fA-F]{2})?\]-")
_SLOT = re.compile(r"([0-9a-fA-F]{2}\.[0-7])")
_PREFIX = re.compile(r"[ |]*")
_GPU = re.compile(
    r"(NVIDIA Corporation|Advanced Micro Devices.*?(Instinct|Radeon|Navi|Vega|Aldebaran|Aqua|"
    r"Arcturus)).*"
)
_NOT_GPU = re.compile(
    r"audio|usb|ucsi|nvswitch|bridge|serial|switch|ethernet|bluefield|controller", re.IGNORECASE
)
_NIC = re.compile(r"Mellanox|ConnectX|BlueField|Elastic Fabric|Omni-Path|InfiniBand")


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A leaf of the tree.

    Attributes:
        bus_id: Domain, bus, slot and function.
        name: As printed.
        path: The root bus, then the bus below each bridge or switch port on the way.
    """

    bus_id: str
    name: str
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PciTree:
    """GPUs and network adapters in the order printed; `num_devices` counts all leaves."""

    gpus: tuple[PciDevice, ...]
    nics: tuple[PciDevice, ...]
    num_devices: int


def is_pci_tree(text: str) -> bool:
    """Return whether the text is the tree of `lspci -tv`."""
    return any(_ROOT.match(line.lstrip(" +\\|-"), 0) or _root(line) for _, line in _lines(text))


def parse_pci_tree(text: str) -> PciTree:
    """Return the GPUs and network adapters in the tree of `lspci -tv`.

    Raises:
        ProbeError: A branch hangs on nothing.
        ValueError: There is no such tree, or it names no devices (`lspci -t` without `-v`).
    """
    branches: dict[int, tuple[str, ...]] = {}  # the path of the bus whose branch is in a column
    leaves: list[PciDevice] = []
    for number, line in _lines(text):
        if not line.strip():
            continue
        root = _root(line)
        if root is not None:
            start, path = root.end() - 1, (root[1] or "0000:") + root[2]
            branches = {}
            _read_line(number, line, start, (path,), branches, leaves)
            continue
        column = _PREFIX.match(line)
        at = column.end() if column else 0
        if line[at : at + 2] not in ("+-", "\\-"):
            if leaves:
                break  # past the tree
            continue
        if at not in branches:
            raise refusal(number, line, "a branch of the tree hangs on nothing")
        _read_line(number, line, at, branches[at], branches, leaves)
    if not leaves or not any(leaf.name for leaf in leaves):
        raise ValueError("no named PCI devices in the text; expected the output of `lspci -tv`")
    gpus = [leaf for leaf in leaves if _GPU.search(leaf.name) and not _NOT_GPU.search(leaf.name)]
    nics = [leaf for leaf in leaves if _NIC.search(leaf.name)]
    return PciTree(tuple(gpus), tuple(nics), len(leaves))


def _lines(text: str) -> list[tuple[int, str]]:
    return numbered_lines(text)


def _root(line: str) -> re.Match[str] | None:
    return re.match(
        r"[ |]*[-+\\]+-?\[([0-9a-fA-F]{4,8}:)([0-9a-fA-F]{2})(?:-[0-9a-fA-F]{2})?\]-", line
    )


def _read_line(
    number: int,
    line: str,
    at: int,
    path: tuple[str, ...],
    branches: dict[int, tuple[str, ...]],
    leaves: list[PciDevice],
) -> None:
    """Follow one line from the branch in column `at` of the bus at the end of `path`."""
    while True:
        dash = re.compile(r"-*([+\\]?)-*").match(line, at)
        assert dash is not None  # matches the empty text
        if dash[1]:
            column = dash.start(1)
            for other in [other for other in branches if other > column]:
                del branches[other]
            branches[column] = path
        slot = _SLOT.match(line, dash.end())
        if slot is None:
            raise refusal(number, line, "expected a device such as 01.0 at the end of a branch")
        bus = _BUS.match(line, slot.end())
        if bus is None:
            name = line[slot.end() :].strip()
            domain = path[0].partition(":")[0]
            last = path[-1].rpartition(":")[2]
            leaves.append(PciDevice(f"{domain}:{last}:{slot[1]}", name, path))
            return
        path = (*path, bus[1])
        at = bus.end() - 1
        if at >= len(line.rstrip()) - 0 or not line[bus.end() :].strip("-"):
            return  # a bridge with nothing behind it
