"""Reads `nvidia-smi -q`, the indented log of everything about each GPU."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rankwright.topology.device_table import MIB
from rankwright.topology.readers.listing import ListedGpu
from rankwright.topology.readers.text import numbered_lines, refusal

_GPU = re.compile(r"GPU ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f])\s*$")
_VALUE = re.compile(r"(.+?)\s*:\s(.*)$")

_Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SmiLog:
    """The GPUs in a log; `attached` is how many the driver has, which `-i` shows a part of."""

    gpus: tuple[ListedGpu, ...]
    attached: int | None


def is_smi_log(text: str) -> bool:
    """Return whether the text is a log of `nvidia-smi -q`."""
    return "NVSMI LOG=" in text


def parse_smi_log(text: str) -> SmiLog:
    """Return the GPUs that `nvidia-smi -q` (or a section of it, `-d`) describes.

    Raises:
        ProbeError: A GPU is described twice, or more of them than are attached.
        ValueError: No GPU is described.
    """
    head: dict[_Path, str] = {}
    logs: list[tuple[str, dict[_Path, str], int]] = []
    stack: list[tuple[int, str]] = []
    for number, line in numbered_lines(text):
        start = _GPU.match(line)
        if start is not None:
            if any(bus == start[1] for bus, _, _ in logs):
                raise refusal(number, line, "the GPU is described twice")
            logs.append((start[1], {}, 0))
            stack = []
            continue
        body = line.strip()
        if not body:
            continue
        indent = len(line) - len(line.lstrip())
        while stack and stack[-1][0] >= indent:
            stack.pop()
        entry = _VALUE.match(body)
        if entry is None:
            stack.append((indent, body))
            continue
        path = (*(title for _, title in stack), entry[1])
        values = logs[-1][1] if logs else head
        if logs and entry[1] == "Type" and stack and "C" in entry[2].split("+"):
            logs[-1] = (logs[-1][0], values, logs[-1][2] + 1)
        values.setdefault(path, entry[2].strip())
    attached = _number(head.get(("Attached GPUs",)))
    if not logs:
        raise ValueError("no GPU in the log; expected the output of `nvidia-smi -q`")
    if attached is not None and len(logs) > attached:
        raise refusal(1, "Attached GPUs", f"{attached} are attached, {len(logs)} described")
    complete = attached == len(logs)
    # Since 610 the second has a remark behind it, "[Deprecated; ... Use KMD Version instead]".
    driver = head.get(("KMD Version",)) or head.get(("Driver Version",))
    gpus = tuple(
        _listed(position if complete else None, bus, values, processes, driver)
        for position, (bus, values, processes) in enumerate(logs)
    )
    return SmiLog(gpus, attached)


def _listed(
    index: int | None, bus: str, values: dict[_Path, str], processes: int, driver: str | None
) -> ListedGpu:
    total = _mib(values.get(("FB Memory Usage", "Total")))
    free = _mib(values.get(("FB Memory Usage", "Free")))
    # Titles of the power section differ by driver: before 525, up to 575, and later.
    titles = ("GPU Power Readings", "Power Readings")
    limits = [(titles[0], "Current Power Limit"), (titles[1], "Enforced Power Limit")]
    limits.append((titles[1], "Power Limit"))
    ecc = values.get(("ECC Mode", "Current")) or values.get(("Ecc Mode", "Current"))
    return ListedGpu(
        index=index,
        name=values.get(("Product Name",)),
        uuid=values.get(("GPU UUID",)),
        bus_id=bus,
        memory_total_bytes=total,
        memory_free_bytes=free,
        pcie_generation=_number(values.get(("PCI", "GPU Link Info", "PCIe Generation", "Max"))),
        pcie_width=_number(values.get(("PCI", "GPU Link Info", "Link Width", "Max"))),
        mig=_switch(values.get(("MIG Mode", "Current"))),
        ecc=_switch(ecc),
        power_limit_w=_first(values, limits, "W"),
        num_processes=processes,
        driver=driver,
        pcie_width_now=_number(values.get(("PCI", "GPU Link Info", "Link Width", "Current"))),
        default_power_limit_w=_first(
            values, [(title, "Default Power Limit") for title in titles], "W"
        ),
        max_clock_hz=_hertz(values, "Max Clocks", "SM"),
        set_clock_hz=_hertz(values, "Applications Clocks", "Graphics"),
        default_clock_hz=_hertz(values, "Default Applications Clocks", "Graphics"),
    )


def _first(values: dict[_Path, str], paths: Iterable[_Path], unit: str) -> float | None:
    """Return the number of the first of some entries that has one in `unit`."""
    for path in paths:
        match = re.match(rf"(\d{{1,5}}(?:\.\d+)?) {unit}$", values.get(path, ""))
        if match is not None:
            return float(match[1])
    return None


def _hertz(values: dict[_Path, str], *path: str) -> float | None:
    mhz = _first(values, [path], "MHz")
    return mhz * 1e6 if mhz else None


def _mib(value: str | None) -> int | None:
    match = re.match(r"(\d{1,9}) MiB$", value or "")
    return int(match[1]) * MIB if match else None


def _number(value: str | None) -> int | None:
    match = re.match(r"(\d{1,4})x?$", value or "")
    return int(match[1]) if match else None


def _switch(value: str | None) -> bool | None:
    return {"enabled": True, "disabled": False}.get((value or "").lower())
