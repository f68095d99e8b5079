"""Reads what `amd-smi` says of single GPUs: `static`, `list`, `metric`, and its plain table.

Each can be printed as JSON (`--json`) or as indented text of the same words; both become one
dictionary a GPU here. Formats: AMD SMI's change log and the captures in its issues.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from rankwright.topology.device_table import MIB
from rankwright.topology.readers.listing import ListedGpu
from rankwright.topology.readers.text import clean, numbered_lines, refusal

Facts = dict[str, Any]

_GPU_LINE = re.compile(r"GPU: (\d{1,3})\s*$")
_ENTRY = re.compile(r"(\s+)([A-Z][A-Z0-9_]*): ?(.*?)\s*$")
# One of these tells the output of `amd-smi` from other indented text.
_OWN = re.compile(r"^\s+(MARKET_NAME|BDF): *\S", re.MULTILINE)
_TABLE_BDF = re.compile(
    r"\|\s*([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\s+(\S.*?)\s*\|", re.IGNORECASE
)
_TABLE_IDS = re.compile(
    r"\|\s*(\d{1,3})\s+(\d{1,3}|N/A)\s.*?\|.*?(?:(\d{1,7})/(\d{1,7}) MB)?\s*\|\s*$"
)
_UNITS = {"B": 1, "KB": 2**10, "MB": MIB, "GB": 2**30}
_SIZE = re.compile(r"(\d{1,15}) (B|KB|MB|GB)")


def is_amd_listing(text: str) -> bool:
    """Return whether the text names GPUs as `amd-smi static`, `list` or its plain table do."""
    text = clean(text)
    if re.search(r"^GPU: \d+\s*$", text, re.MULTILINE) and _OWN.search(text):
        return True
    if _TABLE_BDF.search(text) and "HIP-ID" in text:
        return True
    return any("asic" in record or "bdf" in record for record in records(text))


def records(text: str) -> list[Facts]:
    r"""Return the records with a GPU's number in all JSON of a capture, in order.

    >>> records('$ amd-smi list --json\n[{"gpu": 0, "bdf": "0000:0c:00.0"}]')
    [{'gpu': 0, 'bdf': '0000:0c:00.0'}]
    """
    return [
        record
        for document in _documents(clean(text))
        for record in map(as_facts, _listed_in(document))
        if _number(record.get("gpu")) is not None
    ]


def as_facts(value: Any) -> Facts:
    """Return a dictionary of JSON as one; empty where the value is none."""
    return cast(Facts, value) if isinstance(value, dict) else {}


def as_list(value: Any) -> Sequence[Any] | None:
    """Return an array of JSON as one, None where the value is none."""
    return cast(Sequence[Any], value) if isinstance(value, list) else None


def _listed_in(document: Any) -> Sequence[Any]:
    if isinstance(document, dict):
        document = as_facts(document).get("gpu_data", [document])
    return as_list(document) or []


def _documents(text: str) -> Iterator[Any]:
    """Yield each JSON array or object of a capture that starts a line."""
    decoder = json.JSONDecoder()
    end = 0
    for start in re.finditer(r"^[ \t]*(?=[\[{]\s*(?:[\[{\"]|$))", text, re.MULTILINE):
        if start.end() < end:
            continue  # within the one before
        try:
            document, end = decoder.raw_decode(text, start.end())
        except (ValueError, RecursionError):
            continue
        yield document


def parse_amd_listing(text: str) -> tuple[ListedGpu, ...]:
    """Return the GPUs that a capture of `amd-smi` names, by number, and what it says of each.

    Raises:
        ProbeError: It says two things of one GPU.
    """
    found: dict[int, Facts] = {}
    for record in records(text):
        _merge(found.setdefault(int(record["gpu"]), {}), record, 1, f"GPU {record['gpu']}")
    for number, line, gpu, path, value in _text_entries(text):
        _merge(found.setdefault(gpu, {}), _nested(path, value), number, line)
    for number, line, gpu, facts in _table_entries(text):
        _merge(found.setdefault(gpu, {}), facts, number, line)
    return tuple(_listed(gpu, facts) for gpu, facts in sorted(found.items()))


def hip_numbers(text: str) -> dict[int, int]:
    """Return HIP's number of each GPU by that of amd-smi, which goes by PCI address.

    >>> hip_numbers('[{"gpu": 0, "hip_id": 1}, {"gpu": 1, "hip_id": 0}]')
    {0: 1, 1: 0}
    """
    told = [(record["gpu"], record.get("hip_id")) for record in records(text)]
    told += [(gpu, facts.get("hip_id")) for _, _, gpu, facts in _table_entries(text)]
    told += [(gpu, value) for _, _, gpu, path, value in _text_entries(text) if path == ("hip_id",)]
    found: dict[int, int | None] = {}
    for gpu, value in told:  # most of its commands do not tell
        number = _number(value)
        found[gpu] = found.get(gpu) if number is None else number
    numbers = {gpu: hip for gpu, hip in found.items() if hip is not None}
    return numbers if len(set(numbers.values())) == len(numbers) == len(found) else {}


def _text_entries(text: str) -> Iterator[tuple[int, str, int, tuple[str, ...], str]]:
    """Yield line number, line, GPU, path of words and value of each entry of the text form."""
    gpu: int | None = None
    above: list[tuple[int, str]] = []
    for number, line in numbered_lines(text):
        start = _GPU_LINE.match(line)
        entry = _ENTRY.match(line)
        if start is not None:
            gpu, above = int(start[1]), []
        elif entry is None or gpu is None:
            gpu = gpu if not line.strip() else gpu if line[:1].isspace() else None
        else:
            depth, word, value = len(entry[1]), entry[2].lower(), entry[3]
            above = [(at, outer) for at, outer in above if at < depth]
            if value:
                yield number, line, gpu, (*(outer for _, outer in above), word), value
            else:
                above.append((depth, word))


def _table_entries(text: str) -> Iterator[tuple[int, str, int, Facts]]:
    """Yield line number, line, GPU and facts of each pair of rows of the plain table."""
    before: re.Match[str] | None = None
    for number, line in numbered_lines(text):
        ids = _TABLE_IDS.match(line) if before is not None else None
        if ids is not None and before is not None:
            facts: Facts = {"bdf": before[1], "asic": {"market_name": before[2]}}
            if ids[2] != "N/A":
                facts["hip_id"] = int(ids[2])
            if ids[3] is not None:
                facts["mem_usage"] = {"used_vram": f"{ids[3]} MB", "total_vram": f"{ids[4]} MB"}
            yield number, line, int(ids[1]), facts
        before = _TABLE_BDF.match(line)


def _nested(path: tuple[str, ...], value: str) -> Facts:
    nested: Any = value
    for word in reversed(path):
        nested = {word: nested}
    return dict(nested)


def _merge(into: Facts, more: Facts, number: int, line: str) -> None:
    for word, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(word), dict):
            _merge(into[word], as_facts(value), number, line)
        elif word in ("market_name", "bdf") and into.get(word, value) != value:
            raise refusal(number, line, f"{word} was {into[word]!r} before")
        else:
            into[word] = {**as_facts(value)} if isinstance(value, dict) else value


def _listed(gpu: int, facts: Facts) -> ListedGpu:
    def at(*path: str) -> Any:
        value: Any = facts
        for word in path:
            value = as_facts(value).get(word)
        return value

    name = at("asic", "market_name")
    bus_id = at("bus", "bdf") or at("bdf")
    total = _bytes(at("vram", "size")) or _bytes(at("mem_usage", "total_vram"))
    used = _bytes(at("mem_usage", "used_vram"))
    version = re.fullmatch(r"Gen (\d)", str(at("bus", "pcie_interface_version")))
    return ListedGpu(
        gpu,
        name if isinstance(name, str) and name != "N/A" else None,
        bus_id=bus_id.lower() if isinstance(bus_id, str) else None,
        memory_total_bytes=total,
        memory_free_bytes=total - used if total and used is not None and used <= total else None,
        pcie_generation=int(version[1]) if version else None,
        pcie_width=_number(at("bus", "max_pcie_width")),
        numa_node=_number(at("numa", "node")),
    )


def _bytes(value: Any) -> int | None:
    """Return the bytes of `{"value": 196592, "unit": "MB"}` or "196592 MB", in powers of 1,024."""
    if size_of := as_facts(value):
        value = f"{size_of.get('value')} {size_of.get('unit')}"
    size = _SIZE.fullmatch(str(value))
    return int(size[1]) * _UNITS[size[2]] if size and int(size[1]) else None


def _number(value: Any) -> int | None:
    text = "" if isinstance(value, bool) else str(value)
    return int(text) if re.fullmatch(r"\d{1,4}", text) else None
