"""Reads lists of GPUs that nvidia-smi prints: `--query-gpu` as CSV, and `-L`."""

import re

from rankwright.topology.device_table import MIB
from rankwright.topology.devices import DEVICES, device_key
from rankwright.topology.errors import find_failure
from rankwright.topology.readers.assemble import FoundGpu

QUERY_FIELDS = (
    "index",
    "name",
    "uuid",
    "memory.total",
    "memory.free",
    "compute_cap",
    "pcie.link.gen.max",
    "pcie.link.width.max",
    "mig.mode.current",
    "driver_version",
)
BASIC_FIELDS = ("index", "name", "uuid", "memory.total", "memory.free", "driver_version")

_LISTED = re.compile(r"^\s*GPU (\d+): (.+?)(?: \(UUID: (GPU-[0-9a-fA-F-]+)\))?\s*$", re.MULTILINE)


def parse_query(text: str, fields: tuple[str, ...] = ()) -> tuple[FoundGpu, ...]:
    """Return the GPUs in the CSV that `nvidia-smi --query-gpu=... --format=csv` printed.

    Args:
        text: With a header line, or without one if `fields` are given; with or without units.
        fields: The fields asked for, in order, when there is no header.

    Raises:
        ProbeError: The text holds an error of nvidia-smi.
        ValueError: There is no such table in the text.
    """
    failure = find_failure(text)
    if failure is not None:
        raise failure
    rows: list[dict[str, str]] = []
    names = [field.split(" ")[0] for field in fields]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if "name" in cells and ("index" in cells or len(cells) > 2):
            names = [cell.split(" ")[0] for cell in cells]
        elif names and len(cells) == len(names):
            rows.append(dict(zip(names, cells, strict=True)))
    found = tuple(_found(row, position) for position, row in enumerate(rows))
    if not found:
        raise ValueError(
            "no GPU list in the text; expected `nvidia-smi --query-gpu=index,name,... --format=csv`"
        )
    return tuple(sorted(found, key=lambda gpu: gpu.index))


def driver_of(text: str, fields: tuple[str, ...]) -> str | None:
    """Return the driver version in the first row of a query without header, if it was asked for."""
    if "driver_version" not in fields or not text.strip():
        return None
    cells = [cell.strip() for cell in text.strip().splitlines()[0].split(",")]
    return cells[fields.index("driver_version")] if len(cells) == len(fields) else None


def parse_list(text: str) -> tuple[FoundGpu, ...]:
    """Return the GPUs that `nvidia-smi -L` listed; memory is the device table's.

    Raises:
        ValueError: The text lists no GPU, or one that the device table lacks.
    """
    found: list[FoundGpu] = []
    for index, name, uuid in _LISTED.findall(text):
        memory = DEVICES[device_key(name)].memory_bytes
        found.append(
            FoundGpu(
                index=int(index),
                name=name,
                total_memory_bytes=memory,
                free_memory_bytes=memory,
                uuid=uuid or None,
            )
        )
    if not found:
        raise ValueError("no GPU list in the text; expected the output of `nvidia-smi -L`")
    return tuple(found)


def _found(row: dict[str, str], position: int) -> FoundGpu:
    name = row["name"]
    total = _integer(row.get("memory.total"))
    total_bytes = DEVICES[device_key(name)].memory_bytes if total is None else total * MIB
    free = _integer(row.get("memory.free"))
    capability = re.fullmatch(r"(\d+)\.(\d+)", row.get("compute_cap", ""))
    uuid = row.get("uuid", "")
    index = _integer(row.get("index"))
    return FoundGpu(
        index=position if index is None else index,
        name=name,
        total_memory_bytes=max(total_bytes, 1),
        free_memory_bytes=total_bytes if free is None else free * MIB,
        uuid=uuid if uuid.startswith("GPU-") else None,
        compute_capability=(int(capability[1]), int(capability[2])) if capability else None,
        pcie_generation=_integer(row.get("pcie.link.gen.max")) or None,
        pcie_width=_integer(row.get("pcie.link.width.max")) or None,
        mig=row.get("mig.mode.current", "").lower() == "enabled",
    )


def _integer(cell: str | None) -> int | None:
    """Return the number in front of a cell, None for `[N/A]` and the like."""
    match = re.match(r"\d{1,15}(?!\d)", cell or "")
    return int(match.group()) if match else None
