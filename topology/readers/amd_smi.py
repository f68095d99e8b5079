"""Reads `amd-smi topology`, as tables and as JSON: how the AMD GPUs of a machine are linked.

It replaces `rocm-smi --showtopo`. Formats, all from AMD SMI's change log and captures in issues:
tables whose rows and columns are PCI addresses (since ROCm 6.0); JSON of one dictionary a table and
GPU, `gpu_0` and so on (to ROCm 6.1); JSON of `links` (since 6.2), under `gpu_data` in later ones.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rankwright.topology.readers.amd_smi_gpus import (
    Facts,
    as_facts,
    as_list,
    hip_numbers,
    parse_amd_listing,
    records,
)
from rankwright.topology.readers.found import FoundGpu, FoundMachine
from rankwright.topology.readers.listing import found_gpu
from rankwright.topology.readers.rocm_smi import RocmTopology, far_pairs_note, link_kinds
from rankwright.topology.readers.text import TableRow, check_square, numbered_lines, refusal

_TITLE = re.compile(r"\s*([A-Z][A-Z -]*?) TABLE:\s*$")
_BDF = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Table:
    """One square table: its words in text and in both forms of JSON, and what cells may be.

    `own` is what a GPU has to itself.
    """

    title: str
    in_links: str
    in_tables: str
    cells: str
    own: str


_TABLES = (
    _Table("ACCESS", "link_status", "link_accessibility", r"ENABLED|DISABLED|N/A", "ENABLED"),
    _Table("WEIGHT", "weight", "weight", r"\d{1,5}|N/A", "0"),
    _Table("HOPS", "num_hops", "hops", r"\d{1,2}|N/A", "0"),
    _Table("LINK TYPE", "link_type", "link_type", r"SELF|XGMI|PCIE|UNKNOWN|N/A", "SELF"),
)


@dataclass(frozen=True, slots=True)
class AmdTopology:
    """What `amd-smi topology` says.

    Attributes:
        links: Weights, hops and kinds, in the form of `rocm-smi`, whose reader explains them.
        buses: PCI address of each GPU, None where the older JSON leaves it out.
        access: Whether each pair reaches each other's memory, None where the table is left out.
    """

    links: RocmTopology
    buses: tuple[str | None, ...]
    access: tuple[tuple[str, ...], ...] | None


def is_amd_topology(text: str) -> bool:
    """Return whether the text has a table, or JSON, of `amd-smi topology`."""
    return any(_title(line) for _, line in numbered_lines(text)) or bool(_json_records(text))


def parse_amd_topology(text: str) -> AmdTopology:
    """Return the tables of `amd-smi topology`.

    Raises:
        ProbeError: A table is not square and symmetric, or two of them are of different GPUs.
        ValueError: There is no such table.
    """
    found = _json_records(text)
    buses, tables = _from_json(found) if found else _from_text(text)
    names = tuple(f"GPU{gpu}" for gpu in range(len(buses)))
    for table, rows in tables.items():
        check_square(names, rows, table.own)
    cells = {table.title: tuple(row.cells for row in rows) for table, rows in tables.items()}
    kinds = cells.get("LINK TYPE")
    links = RocmTopology(
        names=names,
        weight=cells.get("WEIGHT"),
        hops=cells.get("HOPS"),
        link_type=kinds and tuple(tuple("0" if c == "SELF" else c for c in row) for row in kinds),
        numa_node=None,
        numa_affinity=None,
    )
    return AmdTopology(links, buses, cells.get("ACCESS"))


def amd_machine(text: str) -> FoundMachine:
    """Return the machine that `amd-smi topology` links and `amd-smi static` names.

    GPUs have the number that HIP gives them, where `amd-smi list -e` or the plain table tells it.

    Raises:
        ProbeError: A table contradicts itself or the list.
        ValueError: Links or names are missing, or a name is unknown and its memory is not given.
    """
    topology = parse_amd_topology(text)
    listed = {gpu.index: gpu for gpu in parse_amd_listing(text) if gpu.name is not None}
    count = len(topology.buses)
    if sorted(index for index in listed if index is not None) != list(range(count)):
        raise ValueError(
            f"the text shows how {count} GPUs are linked but names {len(listed)}; add the output "
            "of `amd-smi static` to it"
        )
    gpus: list[FoundGpu] = []
    for index, bus_id in enumerate(topology.buses):
        gpu = listed[index]
        if bus_id is not None and gpu.bus_id not in (None, bus_id):
            raise refusal(1, bus_id, f"GPU {index} is at {gpu.bus_id} in the list of GPUs")
        gpus.append(found_gpu(gpu))
    hip = hip_numbers(text)
    numbers = (
        [hip.get(index, index) for index in range(count)] if len(hip) == count else range(count)
    )
    return _machine(topology, gpus, list(numbers))


def _machine(topology: AmdTopology, gpus: list[FoundGpu], numbers: list[int]) -> FoundMachine:
    kinds = {
        (min(numbers[i], numbers[j]), max(numbers[i], numbers[j])): kind
        for (i, j), kind in link_kinds(topology.links).items()
    }
    notes = far_pairs_note(topology.links)
    cut = sum(cell == "DISABLED" for i, row in enumerate(topology.access or ()) for cell in row[:i])
    if cut:
        notes += (f"{cut} pairs of GPUs cannot reach each other's memory: copies go over the host",)
    if numbers != list(range(len(numbers))):
        notes += ("GPUs have HIP's numbers, which are not those of amd-smi here",)
    numbered = [replace(gpu, index=number) for gpu, number in zip(gpus, numbers, strict=True)]
    return FoundMachine(tuple(sorted(numbered, key=lambda gpu: gpu.index)), kinds, None, notes)


def _title(line: str) -> _Table | None:
    title = _TITLE.match(line)
    return next((t for t in _TABLES if title is not None and t.title == title[1]), None)


def _from_text(text: str) -> tuple[tuple[str | None, ...], dict[_Table, list[TableRow]]]:
    tables: dict[_Table, list[TableRow]] = {}
    buses: list[str] = []
    table: _Table | None = None
    header = False
    for number, line in numbered_lines(text):
        words = line.split()
        if _TITLE.match(line):
            table, header = _title(line), True
            if table in tables:
                raise refusal(number, line, "the same table twice")
            if table is not None:
                tables[table] = []
        elif table is None or not words:
            continue
        elif header:
            header = False
            if not all(_BDF.fullmatch(word) for word in words):
                raise refusal(number, line, "expected the PCI addresses of the GPUs")
            buses = buses or [word.lower() for word in words]
            if [word.lower() for word in words] != buses:
                raise refusal(number, line, "a table of other GPUs than the one before")
        elif len(tables[table]) == len(buses):
            table = None  # a legend, or another tool
        else:
            tables[table].append(_row(number, line, words, table, buses))
    if not tables:
        raise ValueError("no tables in the text; expected the output of `amd-smi topology`")
    return tuple(buses), tables


def _row(number: int, line: str, words: list[str], table: _Table, buses: list[str]) -> TableRow:
    cells = words[1:]
    if not _BDF.fullmatch(words[0]) or not all(re.fullmatch(table.cells, c) for c in cells):
        raise refusal(
            number, line, f"expected a PCI address and the cells of its {table.title} row"
        )
    name = words[0].lower()
    return TableRow(number, f"GPU{buses.index(name)}" if name in buses else name, tuple(cells))


def _json_records(text: str) -> list[Facts]:
    return [record for record in records(text) if _cells_of(record) is not None]


def _cells_of(record: Facts) -> Callable[[_Table, int], Any] | None:
    """Return how a record says what its GPU's table has for another GPU; None: it says no table."""
    links = as_list(record.get("links"))
    if links is not None:
        by_gpu = {str(link.get("gpu")): link for link in map(as_facts, links)}
        return lambda table, gpu: by_gpu.get(str(gpu), {}).get(table.in_links)
    if any(isinstance(record.get(table.in_tables), dict) for table in _TABLES):
        return lambda table, gpu: as_facts(record.get(table.in_tables)).get(f"gpu_{gpu}")
    return None


def _from_json(
    found: list[Facts],
) -> tuple[tuple[str | None, ...], dict[_Table, list[TableRow]]]:
    count = len(found)
    if [record["gpu"] for record in found] != list(range(count)):
        numbers = ", ".join(str(record["gpu"]) for record in found)
        raise refusal(1, numbers, f"expected GPUs 0 to {count - 1}, once each")
    tables: dict[_Table, list[TableRow]] = {}
    for table in _TABLES:
        rows: list[TableRow] = []
        for gpu, record in enumerate(found):
            _check_size(record, count)
            read = _cells_of(record)
            assert read is not None
            cells = [read(table, other) for other in range(count)]
            if any(c is not None and not re.fullmatch(table.cells, str(c)) for c in cells):
                raise refusal(1, f"gpu {gpu}", f"{table.in_links} has {cells}")
            rows.append(TableRow(1, f"GPU{gpu}", tuple(str(c) for c in cells if c is not None)))
        if any(row.cells for row in rows):
            tables[table] = rows
    buses = tuple(_bus(record) for record in found)
    return buses, tables


def _check_size(record: Facts, count: int) -> None:
    """Check that a record tells of `count` GPUs and of no other."""
    links = as_list(record.get("links"))
    if links is not None and len(links) != count:
        raise refusal(1, f"gpu {record['gpu']}", f"{len(links)} links, and {count} GPUs")
    for table in _TABLES:
        size = len(as_facts(record.get(table.in_tables)))
        if isinstance(record.get(table.in_tables), dict) and size != count:
            raise refusal(1, f"gpu {record['gpu']}", f"{size} GPUs, where {count} are listed")


def _bus(record: Facts) -> str | None:
    bus = record.get("bdf")
    return bus.lower() if isinstance(bus, str) and _BDF.fullmatch(bus) else None
