"""Reads a trace: requests as they really came, one a line.

JSON Lines or CSV, with `arrival_s`, `input_tokens`, `output_tokens`, and where known
`cached_tokens` of the prompt. A bad row is refused by file, line and field.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from rankwright.cost_model.workload import MOST_TOKENS, Workload
from rankwright.topology.value import Value

_REQUIRED = ("arrival_s", "input_tokens", "output_tokens")
_COLUMNS = (*_REQUIRED, "cached_tokens")


class TraceRow(Value):
    """One request."""

    arrival_s: float = Field(ge=0, allow_inf_nan=False, description="after the trace's start")
    input_tokens: int = Field(ge=1, le=MOST_TOKENS)
    output_tokens: int = Field(ge=1, le=MOST_TOKENS)
    cached_tokens: int = Field(default=0, ge=0, description="of the prompt, in the prefix cache")

    @model_validator(mode="after")
    def _cached_within_prompt(self) -> "TraceRow":
        if self.cached_tokens > self.input_tokens:
            raise ValueError(
                f"cached_tokens {self.cached_tokens} exceed the prompt's {self.input_tokens}"
            )
        return self


def read_trace(path: Path) -> tuple[TraceRow, ...]:
    """Return the requests in `path`, by arrival.

    Raises:
        ValueError: The file cannot be read, is empty, or a row is wrong: names line and field.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ValueError(f"trace {path}: {reason}") from None
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise ValueError(
            f"trace {path} is empty; expected JSON Lines or CSV with {', '.join(_REQUIRED)}"
        )
    rows = _json_lines(path, lines) if first.lstrip().startswith("{") else _csv(path, lines)
    found = [_row(path, number, values) for number, values in rows]
    if not found:
        raise ValueError(f"trace {path} has a head and no requests")
    return tuple(sorted(found, key=lambda row: row.arrival_s))


def workload_of(trace: tuple[TraceRow, ...]) -> Workload:
    """Return the workload of the same means: lengths, rate and cached share.

    A trace without any length in time, such as one of requests that all come at once, has no rate:
    its concurrency is the number of its requests.
    """
    count = len(trace)
    inputs = sum(row.input_tokens for row in trace)
    span_s = trace[-1].arrival_s - trace[0].arrival_s
    return Workload(
        input_tokens=max(1, round(inputs / count)),
        output_tokens=max(1, round(sum(row.output_tokens for row in trace) / count)),
        shared_prefix=sum(row.cached_tokens for row in trace) / inputs,
        request_rate=(count - 1) / span_s if span_s > 0 else None,
        concurrency=count if span_s == 0 else None,
    )


def _json_lines(path: Path, lines: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"trace {path}, line {number}: no JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(
                f"trace {path}, line {number}: expected an object with {', '.join(_REQUIRED)}"
            )
        yield number, value


def _csv(path: Path, lines: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(lines)
    names = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise ValueError(
            f"trace {path}, line 1: no column {', '.join(missing)}; found {', '.join(names)}"
        )
    reader.fieldnames = names
    for values in reader:
        if None in values or None in values.values():
            raise ValueError(
                f"trace {path}, line {reader.line_num}: expected {len(names)} fields, as in the "
                "head"
            )
        yield (
            reader.line_num,
            {name: text.strip() for name, text in values.items() if name in _COLUMNS},
        )


def _row(path: Path, number: int, values: Mapping[str, Any]) -> TraceRow:
    try:
        return TraceRow.model_validate(
            {name: value for name, value in values.items() if name in _COLUMNS}
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        at = f", field {field}" if field else ""
        given = f", got {values[field]!r}" if field in values else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"trace {path}, line {number}{at}: {message}{given}") from None
