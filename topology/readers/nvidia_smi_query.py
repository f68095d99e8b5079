"""Reads lists of GPUs that nvidia-smi prints: `--query-gpu` as CSV, and `-L`."""

import re
from dataclasses import replace

from rankwright.topology.device_table import MIB
from rankwright.topology.errors import find_failure
from rankwright.topology.readers.found import FoundGpu
from rankwright.topology.readers.listing import ListedGpu, found_gpu
from rankwright.topology.readers.text import numbered_lines, refusal

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
LIMIT_FIELDS = (
    "pcie.link.width.current",
    "power.limit",
    "power.default_limit",
    "clocks.max.sm",
    "clocks.applications.graphics",
    "clocks.default_applications.graphics",
)
BASIC_FIELDS = ("index", "name", "uuid", "memory.total", "memory.free", "driver_version")

# A uuid may be masked: `(UUID: GPU-...)`. Environment reports name equal GPUs on one line.
_LISTED = re.compile(
    r"\s*GPU (\d{1,3}(?:,\d{1,3})*): (.+?)(?: +\(UUID: ([\w-]+(?:\.\.\.)?)\))?\s*$"
)
_MIG_LISTED = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[\w/-]*(?:\.\.\.)?)\)\s*$")
_FIELD = re.compile(r"[a-z]\w*(?:\.\w+)*(?: \[\w?[^\]]*\])?$")
_NAMES = {"gpu_name": "name", "gpu_uuid": "uuid", "gpu_bus_id": "pci.bus_id"}
_IDENTITY = {"index", "name", "uuid", "pci.bus_id"}


def is_query(text: str) -> bool:
    """Return whether the text has the header of `--query-gpu=... --format=csv`."""
    return any(_header(line) for _, line in numbered_lines(text))


def is_list(text: str) -> bool:
    """Return whether the text has a line of `nvidia-smi -L`."""
    return any(_LISTED.match(line) for _, line in numbered_lines(text))


def parse_query(text: str, fields: tuple[str, ...] = ()) -> tuple[FoundGpu, ...]:
    """Return the GPUs in the CSV that `nvidia-smi --query-gpu=... --format=csv` printed.

    Args:
        text: With a header line, or without one if `fields` are given; with or without units.
        fields: The fields asked for, in order, when there is no header.

    Raises:
        ProbeError: The text holds an error of nvidia-smi, or a row that does not fit the header.
        ValueError: There is no such table in the text, or a GPU without name.
    """
    return tuple(found_gpu(gpu) for gpu in list_query(text, fields))


def list_query(text: str, fields: tuple[str, ...] = ()) -> tuple[ListedGpu, ...]:
    """Return the rows of such a CSV, whatever was asked for, in order of index.

    Raises:
        ProbeError: The text holds an error of nvidia-smi, or a row that does not fit the header.
        ValueError: There is no such table in the text.
    """
    # A cell in brackets, such as [Insufficient Permissions], is of one field and no failure.
    failure = find_failure(re.sub(r"\[[^\]\n]*\]", "", text))
    if failure is not None:
        raise failure
    names = [_NAMES.get(field, field) for field in (field.split(" ")[0] for field in fields)]
    rows: list[ListedGpu] = []
    for number, line in numbered_lines(text):
        header = _header(line)
        if header:
            if rows and header == names:
                raise refusal(number, line, "the same header twice: two tables, or parts of one")
            if rows:
                break
            names = header
            continue
        if "," not in line:
            if rows:
                break
            continue
        cells = [cell.strip() for cell in line.split(",")]
        if names and len(cells) == len(names):
            rows.append(_listed(number, line, dict(zip(names, cells, strict=True)), len(rows)))
        elif names and (rows or cells[0].isdigit()):
            raise refusal(number, line, f"{len(cells)} cells under {len(names)} fields")
    if not rows:
        raise ValueError(
            "no GPU list in the text; expected `nvidia-smi --query-gpu=index,name,... --format=csv`"
        )
    if len({gpu.index for gpu in rows}) != len(rows):
        raise refusal(1, "index", "two rows have the same index")
    return tuple(sorted(rows, key=lambda gpu: gpu.index or 0))


def driver_of(text: str, fields: tuple[str, ...]) -> str | None:
    """Return the driver version in the first row of a query without header, if it was asked for."""
    if "driver_version" not in fields or not text.strip():
        return None
    cells = [cell.strip() for cell in text.strip().splitlines()[0].split(",")]
    return cells[fields.index("driver_version")] if len(cells) == len(fields) else None


def list_names(text: str) -> tuple[ListedGpu, ...]:
    """Return the GPUs that `nvidia-smi -L` listed, with their MIG devices, in the order printed.

    Raises:
        ProbeError: A line is cut.
        ValueError: The text lists no GPU.
    """
    gpus: list[ListedGpu] = []
    for number, line in numbered_lines(text):
        gpu = _LISTED.match(line)
        if gpu is not None:
            if gpu[2].count("(") != gpu[2].count(")"):
                raise refusal(number, line, "the line is cut")
            uuid = None if gpu[3] is not None and gpu[3].endswith("...") else gpu[3]
            for index in map(int, gpu[1].split(",")):
                if uuid and any((one.index, one.uuid) == (index, uuid) for one in gpus):
                    raise refusal(number, line, f"GPU {index} is listed twice")
                gpus.append(ListedGpu(index, gpu[2], uuid))
            continue
        mig = _MIG_LISTED.match(line)
        if mig is not None:
            if not gpus:
                raise refusal(number, line, "a MIG device of no GPU")
            devices = (*gpus[-1].mig_devices, f"{mig[1]} {mig[3]}")
            gpus[-1] = replace(gpus[-1], mig=True, mig_devices=devices)
    if not gpus:
        raise ValueError("no GPU list in the text; expected the output of `nvidia-smi -L`")
    return tuple(gpus)


def _header(line: str) -> list[str]:
    """Return the field names if a line is a header of at least two, one of them an identity."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) < 2 or not all(_FIELD.match(cell) for cell in cells):
        return []
    names = [_NAMES.get(name, name) for name in (cell.split(" ")[0] for cell in cells)]
    return names if _IDENTITY & set(names) else []


def _listed(number: int, line: str, row: dict[str, str], position: int) -> ListedGpu:
    index: int | None = position
    if "index" in row:
        index = _integer(row["index"])
        if index is None or row["index"] != str(index):
            raise refusal(number, line, f"{row['index']!r} is no index")
    total = _integer(row.get("memory.total"))
    free = _integer(row.get("memory.free"))
    capability = re.fullmatch(r"(\d+)\.(\d+)", row.get("compute_cap", ""))
    return ListedGpu(
        index=index,
        name=row.get("name") or None,
        uuid=row.get("uuid"),
        bus_id=row.get("pci.bus_id"),
        memory_total_bytes=None if total is None else total * MIB,
        memory_free_bytes=None if free is None else free * MIB,
        compute_capability=(int(capability[1]), int(capability[2])) if capability else None,
        pcie_generation=_integer(row.get("pcie.link.gen.max")) or None,
        pcie_width=_integer(row.get("pcie.link.width.max")) or None,
        mig=_switch(row.get("mig.mode.current")),
        ecc=_switch(row.get("ecc.mode.current")),
        power_limit_w=_decimal(row.get("power.limit")),
        driver=row.get("driver_version"),
        pcie_width_now=_integer(row.get("pcie.link.width.current")) or None,
        default_power_limit_w=_decimal(row.get("power.default_limit")),
        max_clock_hz=_hertz(row, "clocks.max.sm"),
        set_clock_hz=_hertz(row, "clocks.applications.graphics", "clocks.applications.gr"),
        default_clock_hz=_hertz(
            row, "clocks.default_applications.graphics", "clocks.default_applications.gr"
        ),
    )


def _integer(cell: str | None) -> int | None:
    """Return the number in front of a cell, None for `[N/A]` and the like."""
    match = re.match(r"\d{1,15}(?!\d)", cell or "")
    return int(match.group()) if match else None


def _decimal(cell: str | None) -> float | None:
    """Return the watts in a cell, None for `[N/A]` and the like."""
    match = re.match(r"(\d{1,5}(?:\.\d+)?)(?: W)?$", cell or "")
    return float(match[1]) if match else None


def _hertz(row: dict[str, str], *names: str) -> float | None:
    """Return the clock in the first of the fields that was asked for; cells are in MHz."""
    mhz = next((_integer(row[name]) for name in names if name in row), None)
    return mhz * 1e6 if mhz else None


def _switch(cell: str | None) -> bool | None:
    return {"enabled": True, "disabled": False}.get((cell or "").lower())
