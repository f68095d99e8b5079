"""What a capture of a tool says: its matrix if it has one, else a table of GPUs or ports."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from rankwright.cli.cluster_page import print_matrix
from rankwright.cli.output import console, table


def print_capture(read: Mapping[str, object], out: Console | None = None) -> None:
    """Print what `describe_topology_text` returned, for people."""
    out = out or console()
    page = cast("Mapping[str, Any]", read)
    matrix: Sequence[Sequence[str]] | None = page.get("matrix")
    if matrix:
        names: Sequence[str] = page["gpu_names"]
        if page.get("complete", True):
            ports = (page.get("nics") or (), page.get("nic_matrix") or ())
            print_matrix(names, matrix, *ports, out=out)
        else:
            rows = table("", *names)
            for name, row in zip(names, matrix, strict=False):
                rows.add_row(name, *row)
            out.print(rows)
    for key in ("gpus", "ports"):
        found = page.get(key)
        if isinstance(found, list) and found:
            _print_records(cast("list[dict[str, object]]", found), out)
    if not matrix:
        plain = {key: value for key, value in page.items() if isinstance(value, int | str)}
        out.print(", ".join(f"{key} {escape(str(value))}" for key, value in plain.items()))
    for note in page.get("notes") or ():
        out.print(f"[dim]note: {escape(note)}[/]")


def _print_records(records: list[dict[str, object]], out: Console) -> None:
    """Print records as a table of the fields that any of them has; sizes are there as MiB too."""
    keys = [
        key
        for key in records[0]
        if not key.endswith("_bytes")
        and any(record.get(key) not in (None, (), []) for record in records)
    ]
    made = table(*(key.replace("_", " ") for key in keys))
    for record in records:
        # Text, since a bus id such as 00:AB:00.0 is an emoji in markup
        made.add_row(*(Text(_cell(record.get(key))) for key in keys))
    out.print(made)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value)
        return ", ".join(f"{key}: {item}" for key, item in pairs.items()) or "-"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(str(item) for item in cast("Sequence[object]", value)) or "-"
    return str(value)
