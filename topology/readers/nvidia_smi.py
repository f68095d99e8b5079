"""Reads the text of `nvidia-smi topo -m`, as found in terminals, issues and chat.

Text like that has lost its tabs, kept its colours, run cells together where the terminal wrapped,
or misses columns that older drivers never printed. The parser therefore does not split columns: it
takes the header's devices, then reads that many link tokens from each row, and what is left of the
row is affinity. What it cannot make sense of it refuses.
"""

import re
from dataclasses import dataclass

from rankwright.topology.errors import ProbeError, find_failure
from rankwright.topology.readers.text import clean, numbered_lines

_TOKEN = re.compile(r"\s*(X(?![A-Za-z0-9])|NV\d{1,2}|PIX|PXB|PHB|NODE|SYS|SOC)")
_LINK_ROW = re.compile(r"\s*(GPU|NIC)\d+\s.*(NV\d|PIX|PXB|PHB|NODE|SYS|SOC)")
_DEVICE = re.compile(r"GPU\d+|NIC\d+|(?:(?!GPU\d|NIC\d)[\w.:-])+")
_HEADER = re.compile(r"^\s*GPU\d+(?=\s|GPU|NIC|$|[a-z])")
_AFFINITY_COLUMNS = re.compile(
    r"\s*(CPU\s*Affinity|NUMA\s*Affinity|GPU\s*NUMA\s*ID)", re.IGNORECASE
)
_LEGEND = re.compile(r"^\s*(NIC\d+):[ \t]+(\S{3,})\s*$", re.MULTILINE)
_MAX_DEVICES = 1024


@dataclass(frozen=True, slots=True)
class TopoMatrix:
    """What one `topo -m` table says; tokens and lists are kept as printed.

    Attributes:
        matrix: GPU x GPU link tokens, `X` on the diagonal.
        gpu_names: Such as `GPU0`, in the order of rows.
        nics: Names of the network ports as the header (or, without it, the rows) has them.
        nic_matrix: One row a port: its token to each GPU, None where the text was cut.
        nic_links: One row a port that has a row: its token to each port.
        cpu_affinity: A CPU list for each GPU, None where blank; None if the column is missing.
        numa_affinity: Likewise.
        gpu_numa_id: Likewise.
        nic_legend: Real name of each port that the legend explains; None without a legend.
    """

    matrix: tuple[tuple[str, ...], ...]
    gpu_names: tuple[str, ...]
    nics: tuple[str, ...]
    nic_matrix: tuple[tuple[str | None, ...], ...]
    nic_links: tuple[tuple[str | None, ...], ...]
    cpu_affinity: tuple[str | None, ...] | None
    numa_affinity: tuple[str | None, ...] | None
    gpu_numa_id: tuple[str | None, ...] | None
    nic_legend: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    name: str
    cells: tuple[str, ...]
    rest: str


def parse_topo_m(text: str) -> TopoMatrix:
    """Return the table in the output of `nvidia-smi topo -m`.

    Raises:
        ProbeError: The text holds an error message of nvidia-smi instead of a table, or a table
            that contradicts itself.
        ValueError: There is no table in the text.
    """
    lines = [line for _, line in numbered_lines(text)]
    start = next((i for i, line in enumerate(lines) if _is_header(line)), None)
    if start is None:
        failure = find_failure(text)
        if failure is not None:
            raise failure
        raise ValueError(
            "no topology table in the text; expected the output of `nvidia-smi topo -m`, whose "
            "header starts with GPU0"
        )
    devices, columns = _read_header(lines[start])
    gpus = [name for name in devices if name.startswith("GPU")]
    nics = [name for name in devices if not name.startswith("GPU")]
    rows = _read_rows(lines, start + 1, nics, len(devices))
    gpu_rows = [row for row in rows if row.name.startswith("GPU")]
    nic_rows = [row for row in rows if not row.name.startswith("GPU")]
    _check(gpus, gpu_rows)
    matrix = tuple(row.cells[: len(gpus)] for row in gpu_rows)
    _check_matrix(matrix, gpus, [row.line for row in gpu_rows])
    nics = nics or [row.name for row in nic_rows]
    affinity = [_read_affinity(row.rest, columns) for row in gpu_rows]
    legend = dict(_LEGEND.findall("\n".join(lines[start + 1 :])))
    return TopoMatrix(
        matrix=matrix,
        gpu_names=tuple(gpus),
        nics=tuple(nics),
        nic_matrix=_nic_matrix(nics, len(gpus), gpu_rows, nic_rows),
        nic_links=tuple(_nic_links(row, len(gpus), len(devices)) for row in nic_rows),
        cpu_affinity=_column(affinity, columns, "cpu"),
        numa_affinity=_column(affinity, columns, "numa"),
        gpu_numa_id=_column(affinity, columns, "id"),
        nic_legend=legend or None,
    )


def has_links(text: str) -> bool:
    """Return whether the text has a row of link tokens, be its header there or not."""
    return any(_LINK_ROW.match(line) for line in clean(text).splitlines())


def is_topo_m(text: str) -> bool:
    """Return whether the text has a header such as `topo -m` prints (`-p2p` has one like it)."""
    return any(_is_header(line) for line in clean(text).splitlines())


def _is_header(line: str) -> bool:
    """Whether a line names GPUs from 0 without any link after the first name."""
    match = _HEADER.match(line)
    return match is not None and not _TOKEN.match(line, match.end())


def _read_header(line: str) -> tuple[list[str], list[str]]:
    """Return the devices and the affinity columns (`cpu`, `numa`, `id`) of a header."""
    affinity = _AFFINITY_COLUMNS.search(line)
    devices = _DEVICE.findall(line[: affinity.start()] if affinity else line)
    tail = line[affinity.start() :].lower() if affinity else ""
    names = {"cpu": r"cpu\s*affinity", "numa": r"numa\s*affinity", "id": r"gpu\s*numa\s*id"}
    columns = [name for name, pattern in names.items() if re.search(pattern, tail)]
    if len(devices) > _MAX_DEVICES:
        raise ValueError(f"the header names {len(devices)} devices, at most {_MAX_DEVICES}")
    return devices, columns


def _read_rows(lines: list[str], start: int, nics: list[str], num_devices: int) -> list[_Row]:
    rows: list[_Row] = []
    seen: set[str] = set()
    known = set(nics)
    for number, line in enumerate(lines[start:], start=start + 1):
        word = line.split(maxsplit=1)
        name = word[0] if word else ""
        if not (re.fullmatch(r"GPU\d+|NIC\d+", name) or name in known):
            if re.match(r"\s*(NIC )?Legend", line):
                break
            continue
        if name in seen:  # a second table follows
            break
        cells, rest = _read_cells(line[line.index(name) + len(name) :], num_devices)
        if not cells:
            continue
        seen.add(name)
        rows.append(_Row(number, name, cells, rest))
    return rows


def _read_cells(body: str, limit: int) -> tuple[tuple[str, ...], str]:
    cells: list[str] = []
    position = 0
    while len(cells) < limit:
        match = _TOKEN.match(body, position)
        if match is None:
            break
        cells.append(match.group(1))
        position = match.end()
    return tuple(cells), body[position:]


def _check(gpus: list[str], rows: list[_Row]) -> None:
    names = [row.name for row in rows]
    if names != gpus:
        raise ProbeError(
            "inconsistent_topology",
            f"the table has {len(gpus)} GPU columns and {len(names)} GPU rows "
            f"({', '.join(names) or 'none'}); copy the whole output of `nvidia-smi topo -m`",
        )
    for row in rows:
        if len(row.cells) < len(gpus):
            raise ProbeError(
                "inconsistent_topology",
                f"line {row.line}: row {row.name} has {len(row.cells)} links for {len(gpus)} GPUs; "
                "copy the whole output of `nvidia-smi topo -m`",
            )


def _check_matrix(matrix: tuple[tuple[str, ...], ...], gpus: list[str], lines: list[int]) -> None:
    for i, row in enumerate(matrix):
        for j, token in enumerate(row):
            if (token == "X") != (i == j):
                raise ProbeError(
                    "inconsistent_topology",
                    f"line {lines[i]}: {gpus[i]} to {gpus[j]} reads {token!r}: X belongs "
                    "on the diagonal and only there; copy the output of `nvidia-smi topo -m` again",
                )
            if token != matrix[j][i]:
                raise ProbeError(
                    "inconsistent_topology",
                    f"line {lines[i]}: {gpus[i]} to {gpus[j]} reads {token!r} one way and "
                    f"{matrix[j][i]!r} the other; copy the output of `nvidia-smi topo -m` again",
                )


def _nic_matrix(
    nics: list[str], num_gpus: int, gpu_rows: list[_Row], nic_rows: list[_Row]
) -> tuple[tuple[str | None, ...], ...]:
    """Tokens from ports to GPUs: the columns of the GPU rows, mended from the ports' own rows."""
    own = {row.name: row.cells for row in nic_rows}
    result: list[tuple[str | None, ...]] = []
    for position, nic in enumerate(nics):
        cells: list[str | None] = []
        for gpu, row in enumerate(gpu_rows):
            at = num_gpus + position
            mirrored = own.get(nic, ())
            cells.append(
                row.cells[at]
                if at < len(row.cells)
                else (mirrored[gpu] if gpu < len(mirrored) else None)
            )
        result.append(tuple(cells))
    return tuple(result)


def _nic_links(row: _Row, num_gpus: int, num_devices: int) -> tuple[str | None, ...]:
    cells: list[str | None] = [*row.cells[num_gpus:]]
    return tuple(cells + [None] * (num_devices - num_gpus - len(cells)))


def _read_affinity(rest: str, columns: list[str]) -> dict[str, str | None]:
    """Return the affinity cells of a row by column, None for a blank one."""
    words = re.sub(r"^[A-Z]{1,3}(?=\d)", "", rest.strip()).split()
    words = [part for word in words for part in re.sub(r"(?<=\d)N/A$", " N/A", word).split()]
    if len(words) < len(columns) and words:
        head = _split_fused(words[0])
        if head is not None and len(columns) - len(words) >= 1 and columns[:2] == ["cpu", "numa"]:
            words[:1] = head
    if len(words) >= len(columns):
        return dict(zip(columns, words, strict=False))
    # Blank cells: NVML prints CPU and NUMA together or not at all, and always an id if it has one.
    values: dict[str, str | None] = dict.fromkeys(columns)
    if words and "id" in columns:
        values["id"] = words.pop()
    for name, word in zip(columns, words, strict=False):
        values[name] = word
    return values


def _split_fused(word: str) -> tuple[str, str] | None:
    """Split a CPU list from the NUMA node printed right behind it, if one cut makes it regular.

    The hyper-threads of a socket are two ranges of one length: `0-47,96-1430` is `0-47,96-143`
    and node 0.

    >>> _split_fused("48-95,144-1911")
    ('48-95,144-191', '1')
    """
    ranges = re.fullmatch(r"(\d{1,6})-(\d{1,6}),(\d{1,6})-(\d{1,12})", word)
    if ranges is None:
        return None
    first, last, third, tail = ranges.groups()
    length = int(last) - int(first)
    for cut in range(1, len(tail)):
        if int(tail[:cut]) - int(third) == length:
            return word[: len(word) - len(tail) + cut], tail[cut:]
    return None


def _column(
    affinity: list[dict[str, str | None]], columns: list[str], name: str
) -> tuple[str | None, ...] | None:
    return tuple(row[name] for row in affinity) if name in columns else None
