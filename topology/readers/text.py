"""What all readers of captured text share: cleaning, and refusing with the line at fault.

Captures come out of terminals, logs, issues and mails. A reader takes what it can read with
certainty and refuses the rest: a wrong matrix costs more than a second look at the machine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rankwright.topology.errors import ProbeError

# Terminal escapes, also where a copy turned the escape character into U+FFFD or dropped it.
_ANSI = re.compile("(?:\x1b|\ufffd|\\^\\[)\\[[0-9;?]*[A-Za-z]|\x1b[()][A-Za-z0-9]")
_BARE_ANSI = re.compile(r"\[\d{0,2}m(?=\s*(GPU|NIC|CPU|NUMA|mlx)|\s)")

# What logs put before each line: a time, a container's or a task's name, the frame of a terminal.
_PREFIXES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S* (?:std(?:out|err) [FP] )?()",
        r"([\w.-]+ +)\| ",
        r"(\[[\w./-]+\]) ",
        r"([ \d]*\d: )",
        r"([\w.-]+: )",
        r"(\u2502) ?",
        r"(?:> ?)+()",  # a mail's quotation
    )
)


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a table of devices against devices; `line` counts from 1."""

    line: int
    name: str
    cells: tuple[str, ...]


@lru_cache(maxsize=2)  # each kind of capture asks for the same text
def clean(text: str) -> str:
    """Return the text without terminal escapes and byte-order mark, with Unix line ends.

    What a log put before every line goes, too, where it is of one source: lines of several tasks
    must not become one table.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    return _without_prefixes(_BARE_ANSI.sub("", _ANSI.sub("", text)))


def _without_prefixes(text: str) -> str:
    lines = text.split("\n")
    for _ in range(2):  # a time and a name
        for prefix in _PREFIXES:
            matches = [prefix.match(line) for line in lines]
            full = [match for match, line in zip(matches, lines, strict=True) if line.strip()]
            if len(full) < 2 or None in full or len({match[1] for match in full if match}) != 1:
                continue
            lines = [
                line[match.end() :].rstrip(" \u2502") if match else ""
                for match, line in zip(matches, lines, strict=True)
            ]
            break
        else:
            break
    return "\n".join(lines)


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the cleaned lines with their numbers, from 1."""
    # Not splitlines: that also cuts at form feeds and the like, and shifts the numbers.
    return list(enumerate(clean(text).split("\n"), start=1))


def refusal(line: int, content: str, why: str) -> ProbeError:
    """Return the error for a line that cannot be read, with the line."""
    return ProbeError(
        "inconsistent_topology",
        f"line {line} ({content.strip()[:80]!r}): {why}; capture the whole output again",
    )


def check_square(names: Sequence[str], rows: Sequence[TableRow], diagonal: str) -> None:
    """Check that a table is square, symmetric, and has `diagonal` on its diagonal and only there.

    Raises:
        ProbeError: It is not; the message names the line.
    """
    if [row.name for row in rows] != list(names):
        where = rows[-1] if rows else TableRow(1, "", ())
        found = ", ".join(row.name for row in rows) or "none"
        raise refusal(
            where.line, where.name, f"{len(names)} columns ({', '.join(names)}) but rows {found}"
        )
    for row in rows:
        if len(row.cells) != len(names):
            raise refusal(row.line, row.name, f"{len(row.cells)} cells for {len(names)} columns")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row.cells):
            if i == j and cell != diagonal:
                raise refusal(
                    row.line, row.name, f"{cell!r} to itself where {diagonal!r} is expected"
                )
            if cell != rows[j].cells[i]:
                raise refusal(
                    row.line,
                    row.name,
                    f"{cell!r} to {names[j]}, but {rows[j].cells[i]!r} the other way "
                    f"(line {rows[j].line})",
                )
