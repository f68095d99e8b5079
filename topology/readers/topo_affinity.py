"""Reads the columns behind the links of `nvidia-smi topo -m`: CPUs and NUMA nodes of each GPU.

Drivers print one to three of them, in text whose blanks may be lost. Cells are read where the row
has one for each column, or only the one that is never blank; any other row is refused.
"""

import re

from rankwright.topology.readers.text import refusal

# Longest first: "NUMA" alone is how people shorten the second.
_COLUMNS = {
    "cpu": r"cpu\s*affinity",
    "id": r"gpu\s*numa\s*id",
    "numa": r"numa(?:\s*affinity)?",
}
_FIRST_COLUMN = re.compile(
    r"\s*(CPU\s*Affinity|NUMA\s*Affinity|GPU\s*NUMA\s*ID|NUMA\b)", re.IGNORECASE
)
_CELL = re.compile(r"N/A|-?\d+(?:[,-]\d+)*")
_ID = re.compile(r"N/A|\d+")


def split_header(line: str) -> tuple[str, str]:
    """Return the part of a header that names devices, and the part that names these columns."""
    first = _FIRST_COLUMN.search(line)
    return (line, "") if first is None else (line[: first.start()], line[first.start() :])


def read_columns(number: int, tail: str) -> list[str]:
    """Return the columns (`cpu`, `numa`, `id`) that the end of a header names, in its order.

    Raises:
        ProbeError: It has words that name none of them.
    """
    found: dict[str, int] = {}
    rest = tail
    for name, pattern in _COLUMNS.items():
        match = re.search(pattern, rest, re.IGNORECASE)
        if match is not None:
            found[name] = match.start()
            rest = rest[: match.start()] + " " * len(match[0]) + rest[match.end() :]
    if re.search(r"\w", rest):
        raise refusal(number, tail, f"{rest.strip()!r} is no column of nvidia-smi")
    return sorted(found, key=lambda name: found[name])


def read_cells(number: int, rest: str, columns: list[str]) -> dict[str, str | None]:
    """Return the cells of a row by column, None for a blank one; remarks behind them are ignored.

    Args:
        number: Of the line.
        rest: What follows the links of the row.
        columns: As `read_columns` returned them.

    Raises:
        ProbeError: It cannot be told which cell belongs to which column.
    """
    words = re.sub(r"^\s*[A-Z]{1,3}(?=\d)", "", rest).replace("N/A", " N/A ").split()
    cells: list[str] = []
    while words and _CELL.fullmatch(words[0]):
        cells.append(words.pop(0))
    if len(cells) < len(columns) and cells and columns[:2] == ["cpu", "numa"]:
        cells[:1] = split_fused(cells[0]) or cells[:1]
    if len(cells) == len(columns):
        return dict(zip(columns, cells, strict=True))
    tabbed = _read_tabbed(rest, columns)
    if tabbed is not None:
        return tabbed
    # Without tabs: CPU and NUMA are mostly blank together, and an id is printed if there is one.
    if not columns or (not words and not cells):
        return dict.fromkeys(columns)
    if not words and len(cells) == 1 and columns[-1] == "id" and _ID.fullmatch(cells[0]):
        return {**dict.fromkeys(columns), "id": cells[0]}
    found = " ".join((*cells, *words)) or "nothing"
    raise refusal(number, rest, f"{found[:40]!r} under the {len(columns)} columns behind the links")


def _read_tabbed(rest: str, columns: list[str]) -> dict[str, str | None] | None:
    """Return the cells where the text has kept its tabs, which alone tell a blank from the next.

    A job whose CPUs are all of another socket has a NUMA node here and no CPU.
    """
    fields = [field.strip() for field in rest.rstrip("\n").split("\t")]
    if columns != ["cpu", "numa", "id"] or len(fields) != 5 or fields[0] or fields[3]:
        return None
    cells = [fields[1], fields[2], fields[4]]
    if not all(_CELL.fullmatch(cell) or not cell for cell in cells):
        return None
    return {name: cell or None for name, cell in zip(columns, cells, strict=True)}


def split_fused(word: str) -> tuple[str, str] | None:
    """Split a CPU list from the NUMA node printed right behind it, if one cut makes it regular.

    The hyper-threads of a socket are two ranges of one length: `0-47,96-1430` is `0-47,96-143`
    and node 0.

    >>> split_fused("48-95,144-1911")
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
