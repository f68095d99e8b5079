"""Reads `rocm-smi --showtopo`, and names, memory and bus ids of AMD GPUs beside it."""

import re
from dataclasses import dataclass, replace

from rankwright.topology.readers.assemble import with_numa
from rankwright.topology.readers.found import FoundMachine
from rankwright.topology.readers.listing import ListedGpu, found_gpu
from rankwright.topology.readers.text import TableRow, check_square, numbered_lines, refusal

_TITLE = re.compile(r"\s*={3,}\s*(.*?)\s*={3,}\s*$")
_SECTIONS = {
    "weight between two gpus": "weight",
    "hops between two gpus": "hops",
    "link type between two gpus": "link_type",
}
_CELLS = {"weight": r"\d{1,5}|N/A", "hops": r"\d{1,2}|N/A", "link_type": r"0|XGMI|PCIE|XXXX|N/A"}
_NUMA = re.compile(
    r"\s*GPU(?:\[| )(\d{1,3})\]?\s*:\s*\(Topology\) Numa (Node|Affinity):\s*(-?\d{1,4})\s*$"
)
_NUMA_LIKE = re.compile(r"\s*GPU(?:\[| )\d+\]?\s*:\s*\(Topology\) Numa")
_SERIES = re.compile(r"\s*GPU\[(\d{1,3})\]\s*:\s*Card [Ss]eries:\s*(\S.*?)\s*$")
_MEMORY = re.compile(
    r"\s*GPU\[(\d{1,3})\]\s*:\s*VRAM Total (Used )?Memory \(B\):\s*(\d{1,15})\s*$", re.IGNORECASE
)
_PCI = re.compile(
    r"\s*GPU\[(\d{1,3})\]\s*:\s*PCI Bus:\s*([0-9A-Fa-f]{4}(?::[0-9A-Fa-f]{2}){2}\.\d)"
)
_CONCISE = re.compile(r"(\d{1,3})\s+(?:\d+\s+)*(?:\[0x|0x)[0-9a-f]{4}\b")
_CONCISE_NAME = re.compile(r"\s{4,}((?:AMD|Instinct|Radeon)\b.*?)\s*$")


@dataclass(frozen=True, slots=True)
class RocmTopology:
    """What `--showtopo` says: square tables as printed (`0` on the diagonal), None if left out."""

    names: tuple[str, ...]
    weight: tuple[tuple[str, ...], ...] | None
    hops: tuple[tuple[str, ...], ...] | None
    link_type: tuple[tuple[str, ...], ...] | None
    numa_node: tuple[str, ...] | None
    numa_affinity: tuple[str, ...] | None


def is_rocm_topology(text: str) -> bool:
    """Return whether the text has one of the tables of `rocm-smi --showtopo`."""
    return any(_section(line) for _, line in numbered_lines(text))


def parse_rocm_topology(text: str) -> RocmTopology:
    """Return the tables that `rocm-smi --showtopo` printed.

    Raises:
        ProbeError: A table is not square and symmetric, or two of them differ in size.
        ValueError: There is no such table.
    """
    tables: dict[str, list[TableRow]] = {}
    headers: dict[str, list[str]] = {}
    numa: dict[str, dict[int, str]] = {"Node": {}, "Affinity": {}}
    section: str | None = None
    for number, line in numbered_lines(text):
        if _TITLE.match(line):
            section = _section(line)
            if section is not None:
                if section in tables:
                    raise refusal(number, line, "the same table twice")
                tables[section] = []
        elif section is not None and not _is_past(line, headers.get(section), tables[section]):
            _add_row(number, line, section, headers, tables[section])
        elif _NUMA_LIKE.match(line):
            entry = _NUMA.match(line)
            if entry is None or int(entry[1]) in numa[entry[2]]:
                raise refusal(number, line, "expected one NUMA node of each GPU")
            numa[entry[2]][int(entry[1])] = entry[3]
    if not tables:
        raise ValueError("no tables in the text; expected the output of `rocm-smi --showtopo`")
    names = next(iter(headers.values()), list[str]())
    for what, rows in tables.items():
        if not rows or headers[what] != names:
            raise refusal(rows[0].line if rows else 1, what, "a table is cut or of another size")
        check_square(names, rows, "0")
    ids = [int(name[3:]) for name in names]
    for what, found in numa.items():
        if found and sorted(found) != sorted(ids):
            raise refusal(1, f"Numa {what}", f"given for GPUs {sorted(found)}, tables have {ids}")
    cells = {what: tuple(row.cells for row in rows) for what, rows in tables.items()}
    return RocmTopology(
        names=tuple(names),
        weight=cells.get("weight"),
        hops=cells.get("hops"),
        link_type=cells.get("link_type"),
        numa_node=tuple(numa["Node"][i] for i in ids) if numa["Node"] else None,
        numa_affinity=tuple(numa["Affinity"][i] for i in ids) if numa["Affinity"] else None,
    )


def rocm_names(text: str) -> dict[int, str]:
    """Return the names of AMD GPUs by index, from `--showproductname` or the plain table."""
    names: dict[int, str] = {}
    index: int | None = None
    for _, line in numbered_lines(text):
        series = _SERIES.match(line)
        if series is not None:
            names[int(series[1])] = series[2]
            continue
        name = _CONCISE_NAME.match(line)
        if index is not None and name is not None:
            names[index] = name[1]
        row = _CONCISE.match(line)
        index = int(row[1]) if row else None
    return names


def rocm_machine(text: str) -> FoundMachine:
    """Return the machine that `--showtopo` links and `--showproductname` names.

    Memory comes from `--showmeminfo vram` where that is there, else from the device table.

    Raises:
        ProbeError: A table contradicts itself.
        ValueError: Links or names are missing, or a name is unknown and its memory is not given.
    """
    topology = parse_rocm_topology(text)
    names = rocm_names(text)
    indices = [int(name[3:]) for name in topology.names]
    if sorted(names) != sorted(indices):
        raise ValueError(
            f"the text shows how {len(indices)} GPUs are linked but names {len(names)}; add the "
            "output of `rocm-smi --showproductname` to it"
        )
    gpus = tuple(found_gpu(gpu) for gpu in _with_memory(text, indices, names))
    kinds = {(indices[i], indices[j]): kind for (i, j), kind in link_kinds(topology).items()}
    notes = far_pairs_note(topology)
    return FoundMachine(with_numa(gpus, topology.numa_node), kinds, None, notes)


def _with_memory(text: str, indices: list[int], names: dict[int, str]) -> list[ListedGpu]:
    gpus = {index: ListedGpu(index, names[index]) for index in indices}
    used: dict[int, int] = {}
    for _, line in numbered_lines(text):
        memory, pci = _MEMORY.match(line), _PCI.match(line)
        if memory is not None and int(memory[1]) in gpus and memory[2]:
            used[int(memory[1])] = int(memory[3])
        elif memory is not None and int(memory[1]) in gpus:
            gpu = gpus[int(memory[1])]
            gpus[int(memory[1])] = replace(gpu, memory_total_bytes=int(memory[3]))
        elif pci is not None and int(pci[1]) in gpus:
            gpus[int(pci[1])] = replace(gpus[int(pci[1])], bus_id=pci[2].lower())
    return [
        replace(gpu, memory_free_bytes=gpu.memory_total_bytes - used[index])
        if gpu.memory_total_bytes is not None and used.get(index, 2**63) <= gpu.memory_total_bytes
        else gpu
        for index, gpu in gpus.items()
    ]


def far_pairs_note(topology: RocmTopology) -> tuple[str, ...]:
    """Return a note on pairs that the driver weighs more than one XGMI link, 15 (Linux, amdkfd).

    Hops do not tell: both tools print one for every pair that XGMI reaches.
    """
    if topology.weight is None or topology.link_type is None:
        return ()
    far = sum(
        kind == "XGMI" and topology.weight[i][j].isdigit() and int(topology.weight[i][j]) > 15
        for i, row in enumerate(topology.link_type)
        for j, kind in enumerate(row[:i])
    )
    if not far:
        return ()
    return (
        f"{far} pairs of GPUs have no XGMI link of their own (weights above the least): their "
        "traffic goes over other GPUs, and what it gets there is not counted",
    )


def link_kinds(topology: RocmTopology) -> dict[tuple[int, int], str]:
    """Return the link token of each pair of positions.

    PCIe in the driver's table means through the CPU: two hops where both GPUs hang on one, more
    where the path also crosses sockets (weights of 40 and 72: Linux, amdkfd's io_links).

    Raises:
        ValueError: The table of link types is missing, or has a type that is neither.
    """
    if topology.link_type is None:
        raise ValueError("the table of link types is missing; capture the whole topology")
    kinds: dict[tuple[int, int], str] = {}
    for i, row in enumerate(topology.link_type):
        for j in range(i + 1, len(row)):
            if row[j] not in ("XGMI", "PCIE"):
                raise ValueError(
                    f"{topology.names[i]} to {topology.names[j]} is of type {row[j]!r}; expected "
                    "XGMI or PCIE"
                )
            hops = topology.hops[i][j] if topology.hops else ""
            pcie = "PHB" if hops in ("1", "2") else "SYS"
            kinds[i, j] = "XGMI" if row[j] == "XGMI" else pcie
    return kinds


def _section(line: str) -> str | None:
    title = _TITLE.match(line)
    return _SECTIONS.get(" ".join(title[1].lower().split())) if title else None


def _is_past(line: str, header: list[str] | None, rows: list[TableRow]) -> bool:
    """Return whether a line is behind a table that has all its rows, as a fence or a remark is."""
    return header is not None and len(rows) == len(header) and not re.match(r"\s*GPU\d", line)


def _add_row(
    number: int, line: str, section: str, headers: dict[str, list[str]], rows: list[TableRow]
) -> None:
    words = line.split()
    if not words:
        return
    if section not in headers:
        if not all(re.fullmatch(r"GPU\d{1,3}", word) for word in words):
            raise refusal(number, line, "expected the header GPU0 GPU1 ...")
        headers[section] = words
        return
    name, cells = words[0], words[1:]
    if not re.fullmatch(r"GPU\d{1,3}", name) or not all(
        re.fullmatch(_CELLS[section], cell) for cell in cells
    ):
        raise refusal(number, line, f"expected a GPU and the cells of its {section} row")
    rows.append(TableRow(number, name, tuple(cells)))
