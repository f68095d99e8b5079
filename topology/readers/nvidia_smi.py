"""Reads the text of `nvidia-smi topo -m`, as found in terminals, issues and chat.

Text like that has lost its tabs, kept its colours, run cells together where the terminal wrapped,
or misses columns that older drivers never printed. The parser therefore does not split columns: it
takes the header's devices, then reads that many link tokens from each row, and what is left of the
row is affinity. What it cannot make sense of it refuses.
"""

import re
from dataclasses import dataclass

from rankwright.topology.errors import ProbeError, find_failure
from rankwright.topology.readers.text import clean, numbered_lines, refusal
from rankwright.topology.readers.topo_affinity import read_cells, read_columns, split_header

_TOKEN = re.compile(r"\s*(X(?![A-Za-z0-9])|NV\d{1,2}|PIX|PXB|PHB|NODE|SYS|SOC)")
_LINK_ROW = re.compile(r"\s*(GPU|NIC)\d+\s.*(NV\d|PIX|PXB|PHB|NODE|SYS|SOC)")
_DEVICE = re.compile(r"GPU\d+|NIC\d+|(?:(?!GPU\d|NIC\d)[\w.:-])+")
_HEADER = re.compile(r"^\s*GPU\d+(?=\s|GPU|NIC|$|[a-z])")
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
    headers = [i for i, line in enumerate(lines) if _is_header(line)]
    # Peer access (`-p2p`) has a header like it, and may come before.
    start = next((i for i in headers if _tells_links(lines[i + 1 :])), next(iter(headers), None))
    if start is None:
        failure = find_failure(text)
        if failure is not None:
            raise failure
        raise ValueError(
            "no topology table in the text; expected the output of `nvidia-smi topo -m`, whose "
            "header starts with GPU0"
        )
    devices, columns = _read_header(start + 1, lines[start])
    gpus = [name for name in devices if name.startswith("GPU")]
    nics = devices[len(gpus) :]
    rows = _read_rows(lines, start + 1, nics, len(devices))
    gpu_rows = [row for row in rows if row.name.startswith("GPU")]
    nic_rows = [row for row in rows if not row.name.startswith("GPU")]
    _check_rows(devices, gpus, [*gpu_rows, *nic_rows])
    _check_links(devices, rows)
    nics = nics or [row.name for row in nic_rows]
    affinity = [read_cells(row.line, row.rest, columns) for row in gpu_rows]
    legend = _read_legend(lines[start + 1 :])
    return TopoMatrix(
        matrix=tuple(row.cells[: len(gpus)] for row in gpu_rows),
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


def _read_header(number: int, line: str) -> tuple[list[str], list[str]]:
    """Return the devices and the affinity columns (`cpu`, `numa`, `id`) of a header."""
    names, tail = split_header(line)
    devices = _DEVICE.findall(names)
    if len(devices) > _MAX_DEVICES:
        raise ValueError(f"the header names {len(devices)} devices, at most {_MAX_DEVICES}")
    twice = next((name for name in devices if devices.count(name) > 1), None)
    if twice is not None:
        raise refusal(number, line, f"{twice} is named twice")
    if sorted(devices, key=lambda name: not name.startswith("GPU")) != devices:
        raise refusal(number, line, "expected the GPUs first, then the ports")
    return devices, read_columns(number, tail)


def _read_rows(lines: list[str], start: int, nics: list[str], num_devices: int) -> list[_Row]:
    rows: list[_Row] = []
    seen: set[str] = set()
    known = set(nics)
    for number, line in enumerate(lines[start:], start=start + 1):
        if _is_header(line) and seen:
            if _tells_links(lines[number:]):
                raise refusal(number, line, "a second table; give one machine, once")
            break  # of peer access, say
        name = next(iter(line.split(maxsplit=1)), "")
        if not (re.fullmatch(r"GPU\d+|NIC\d+", name) or name in known):
            if re.match(r"\s*((NIC )?Legend|X\s*=\s*Self)", line):
                break
            if _TOKEN.match(line):
                raise refusal(number, line, "a row is wrapped, or lost its name")
            continue
        if name in seen:
            raise refusal(number, line, f"a second row of {name}")
        cells, rest = _read_cells(line[line.index(name) + len(name) :], num_devices)
        if not cells:
            if rest.strip() and not rest.lstrip().startswith((":", "=")):
                raise refusal(number, line, f"expected the links of {name}")
            continue
        seen.add(name)
        rows.append(_Row(number, name, cells, rest))
    return rows


def _tells_links(lines: list[str]) -> bool:
    """Return whether the first row of a table has links, not words such as OK of `-p2p`."""
    row = next((line for line in lines if line.strip()), "")
    return len(_TOKEN.findall(re.sub(r"^\s*GPU\d+", "", row))) > 1


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


def _check_rows(devices: list[str], gpus: list[str], rows: list[_Row]) -> None:
    """Check that there is a whole row for each GPU, in order, and rows of ports from the first."""
    names = [row.name for row in rows if row.name.startswith("GPU")]
    if names != gpus:
        raise ProbeError(
            "inconsistent_topology",
            f"the table has {len(gpus)} GPU columns and {len(names)} GPU rows "
            f"({', '.join(names) or 'none'}); copy the whole output of `nvidia-smi topo -m`",
        )
    filled = max(len(row.cells) for row in rows[: len(gpus)])
    ports = [row for row in rows if not row.name.startswith("GPU")]
    if len(devices) > len(gpus):  # else the columns of the ports were cut away
        if len(rows) > len(devices):
            raise _contradiction(rows[-1], f"is no column of the header's {len(devices)}")
        for expected, row in zip(devices[len(gpus) :], ports, strict=False):
            if row.name != expected:
                raise _contradiction(row, f"where the row of {expected} is expected")
        for name in devices[max(filled, len(gpus) + len(ports)) :]:
            raise ProbeError(
                "inconsistent_topology",
                f"the header names {name!r}, of which no row tells a link; copy the whole output "
                "of `nvidia-smi topo -m`",
            )
    for row in rows[: len(gpus)]:
        if len(row.cells) < len(gpus):
            raise _contradiction(row, f"has {len(row.cells)} links for {len(gpus)} GPUs")
        if _TOKEN.match(row.rest):
            raise _contradiction(row, f"has more links than the header's {len(devices)} devices")


def _check_links(devices: list[str], rows: list[_Row]) -> None:
    """Check that cells do not contradict each other; those of ports may be missing."""
    cells = {row.name: dict(zip(devices, row.cells, strict=False)) for row in rows}
    for row in rows:
        for name, token in cells[row.name].items():
            if (token == "X") != (name == row.name):
                raise _contradiction(
                    row, f"to {name} reads {token!r}: X belongs on the diagonal and only there"
                )
            back = cells.get(name, {}).get(row.name, token)
            if back != token:
                raise _contradiction(row, f"to {name} reads {token!r} one way, {back!r} the other")


def _contradiction(row: _Row, what: str) -> ProbeError:
    return ProbeError(
        "inconsistent_topology",
        f"line {row.line}: {row.name} {what}; copy the output of `nvidia-smi topo -m` again",
    )


def _read_legend(lines: list[str]) -> dict[str, str]:
    end = next((at for at, line in enumerate(lines) if _is_header(line)), len(lines))
    return dict(_LEGEND.findall("\n".join(lines[:end])))


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


def _column(
    affinity: list[dict[str, str | None]], columns: list[str], name: str
) -> tuple[str | None, ...] | None:
    return tuple(row[name] for row in affinity) if name in columns else None
