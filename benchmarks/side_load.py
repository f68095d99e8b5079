"""The load that two engines get one after another, and what is measured of each.

Imports nothing of ours: it also runs where the other engine is installed and we are not. An engine
is a function that answers requests of given prompt and output lengths, all sent at once, and
returns the seconds that took. Every load runs twice and the second counts: kernels compile in the
first.
"""

import fnmatch
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Lengths = Sequence[tuple[int, int]]  # prompt and output tokens of each request
Run = Callable[[Lengths], float]


@dataclass(frozen=True)
class Load:
    """What is asked of an engine.

    Attributes:
        batches: Sequences that decode at once.
        prompt: Tokens of their prompts.
        decoded: Steps over which a decode step is timed.
        many: Prompts of that length at once, one token each.
        long_prompts: Prompts alone, tokens.
        mixed: How many requests of random lengths, all at once, and their shortest and longest
            prompt and output: the workload of nano-vllm's README.
    """

    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    prompt: int = 512
    decoded: int = 128
    many: int = 128
    long_prompts: tuple[int, ...] = (4096, 8000)
    mixed: tuple[int, int, int] = (256, 100, 1024)


# For a first try: seconds on a laptop with a model of two layers.
SMALL = Load((1, 2), 8, 4, 2, (16,), (4, 4, 8))
LOADS = {"full": Load(), "small": SMALL}


def mixed_lengths(load: Load) -> list[tuple[int, int]]:
    """Return the lengths of the mixed requests, the same for every engine."""
    count, low, high = load.mixed
    rng = random.Random(0)
    return [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]


def names(load: Load) -> list[str]:
    """Return what is measured, in order; `--rows` chooses among these.

    >>> names(SMALL)
    ['decode-1', 'decode-2', 'prefill-2x8', 'prompt-16', 'mixed-4']
    """
    rows = []
    for batch in load.batches:
        rows.append(f"decode-{batch}")
        if batch == load.many:
            rows.append(f"prefill-{batch}x{load.prompt}")
    return [*rows, *(f"prompt-{length}" for length in load.long_prompts), f"mixed-{load.mixed[0]}"]


def chosen(load: Load, patterns: str) -> list[str]:
    """Return the names that one of some patterns matches, separated by commas (`decode-*,mixed-*`).

    Raises:
        ValueError: A pattern matches none.
    """
    known = names(load)
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not fnmatch.filter(known, pattern):
            raise ValueError(f"no row is called {pattern!r}; there are {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatch(name, one) for one in wanted)]


class Measurement:
    """The rows of one engine, each when it is asked for."""

    def __init__(self, run: Run, load: Load) -> None:
        self._run = run
        self._load = load
        self._first_s: dict[int, float] = {}

    def row(self, name: str) -> dict[str, Any]:
        """Return what is measured under a name: `seconds` or `tokens_per_s`."""
        kind, _, size = name.partition("-")
        if kind == "decode":
            return {"seconds": self._step_s(int(size))}
        if kind == "prefill":
            batch = self._load.many
            return {"tokens_per_s": batch * self._load.prompt / self._prompts_s(batch)}
        lengths = mixed_lengths(self._load) if kind == "mixed" else [(int(size), 1)]
        self._run(lengths)
        seconds = self._run(lengths)
        if kind == "prompt":
            return {"seconds": seconds}
        return {"tokens_per_s": sum(output for _, output in lengths) / seconds}

    def _prompts_s(self, batch: int) -> float:
        """Return the seconds until `batch` prompts have a token each, the better of two runs."""
        if batch not in self._first_s:
            lengths = [(self._load.prompt, 1)] * batch
            self._first_s[batch] = min(self._run(lengths) for _ in range(2))
        return self._first_s[batch]

    def _step_s(self, batch: int) -> float:
        lengths = [(self._load.prompt, self._load.decoded + 1)] * batch
        first_s = self._prompts_s(batch)
        self._run(lengths)
        return (self._run(lengths) - first_s) / self._load.decoded


def measure(
    run: Run,
    load: Load,
    wanted: Sequence[str] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Return a row for each thing measured: `what`, and `seconds` or `tokens_per_s`, or `error`.

    A row that fails leaves the others as they are. `load_average` is the machine's of the last
    minute: a figure taken beside other work says so.

    Args:
        run: The engine.
        load: What it is asked.
        wanted: Of `names`; None: all.
        report: Called with each row as it comes.
    """
    measurement = Measurement(run, load)
    run([(load.prompt, 2)])
    rows: list[dict[str, Any]] = []
    for name in names(load) if wanted is None else wanted:
        row: dict[str, Any] = {"what": name}
        try:
            row |= measurement.row(name)
        except Exception as error:
            row["error"] = repr(error)
        row["load_average"] = os.getloadavg()[0]
        rows.append(row)
        report(row)
    return rows


def append_to(path: Path) -> Callable[[dict[str, Any]], None]:
    """Return what writes each row it is called with behind those of a file, as a line of JSON."""

    def append(row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    return append


def compared(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what both measured, with `speed_ratio`: how many times as fast ours is.

    >>> compared([{"what": "a", "seconds": 2.0}], [{"what": "a", "seconds": 3.0}])
    [{'what': 'a', 'unit': 'seconds', 'ours': 2.0, 'peer': 3.0, 'speed_ratio': 1.5}]
    """
    found = {row["what"]: row for row in peers}
    rows = []
    for row in ours:
        unit = next((name for name in ("seconds", "tokens_per_s") if name in row), None)
        if unit is None or unit not in found.get(row["what"], {}):
            continue
        mine, other = row[unit], found[row["what"]][unit]
        ratio = other / mine if unit == "seconds" else mine / other
        rows.append(
            {"what": row["what"], "unit": unit, "ours": mine, "peer": other, "speed_ratio": ratio}
        )
    return rows
