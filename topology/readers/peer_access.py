"""Reads `nvidia-smi topo -p2p`: whether each pair of GPUs may access each other's memory."""

import re
from dataclasses import dataclass

from rankwright.topology.readers.text import TableRow, check_square, numbered_lines, refusal

# NVML's nvmlGpuP2PStatus_t as nvidia-smi abbreviates it; no word begins another, so that cells
# whose blanks were lost can still be told apart. PNS is another vendor's word for its "PPU".
STATUSES = ("X", "OK", "CNS", "GNS", "PNS", "TNS", "NS", "DR", "U")
_CELL = "(?:" + "|".join(STATUSES) + ")"
_DEVICE = r"[A-Z]{2,4}\d{1,3}"
_HEADER = re.compile(rf"[\s>]*((?:{_DEVICE}\s*)+)$")
_ROW = re.compile(rf"[\s>]*({_DEVICE})\s+({_CELL}(?:\s*{_CELL})*)\s*$")
_ROW_LIKE = re.compile(rf"[\s>]*{_DEVICE}\s")
_LEGEND = re.compile(r"^[\s>]*OK\s*=\s*Status", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PeerAccess:
    """Rows as printed; `complete` is False where a capture without header ends before its last."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    complete: bool


def is_peer_access(text: str) -> bool:
    """Return whether the text is a `topo -p2p` table rather than a `topo -m` one."""
    return _LEGEND.search(text) is not None or any(
        (row := _ROW.match(line)) is not None and set(re.findall(_CELL, row[2])) != {"X"}
        for _, line in numbered_lines(text)
    )


def parse_peer_access(text: str) -> PeerAccess:
    """Return the table that `nvidia-smi topo -p2p r` (or `w`, `n`, `a`, `p`) printed.

    Without its header, leading rows are accepted, as issues quote them.

    Raises:
        ProbeError: The table is not square and symmetric, or has a cell that is no status.
        ValueError: There is no such table.
    """
    header: list[str] | None = None
    rows: list[TableRow] = []
    for number, line in numbered_lines(text):
        match = _HEADER.match(line)
        if match is not None:
            if rows or header:
                break
            header = re.findall(_DEVICE, match.group(1))
            continue
        row = _ROW.match(line)
        if row is not None:
            rows.append(TableRow(number, row[1], tuple(re.findall(_CELL, row[2]))))
        elif rows or header:
            if _ROW_LIKE.match(line):
                raise refusal(number, line, f"expected a status of {', '.join(STATUSES)} a GPU")
            break
    if not rows:
        raise ValueError(
            "no peer-to-peer table in the text; expected the output of `nvidia-smi topo -p2p r`"
        )
    complete = True
    if header is None:
        header, complete = _without_header(rows)
    if complete:
        check_square(header, rows, "X")
    return PeerAccess(tuple(header), tuple(row.cells for row in rows), complete)


def _without_header(rows: list[TableRow]) -> tuple[list[str], bool]:
    """Return the names that the rows' width implies, and whether all rows are there."""
    kind = rows[0].name.rstrip("0123456789")
    width = len(rows[0].cells)
    names = [f"{kind}{index}" for index in range(width)]
    if [row.name for row in rows] != names[: len(rows)]:
        raise refusal(rows[0].line, rows[0].name, "without a header, rows count from 0 on")
    for row in rows:
        if len(row.cells) != width:
            raise refusal(row.line, row.name, f"{len(row.cells)} cells, the first row has {width}")
    head = [TableRow(row.line, row.name, row.cells[: len(rows)]) for row in rows]
    check_square(names[: len(rows)], head, "X")
    return names, len(rows) == width
