"""The load that two engines get one after another, and what is measured of each.

Imports nothing of ours: it also runs where the other engine is installed and we are not. An engine
is a function that answers requests of given prompt and output lengths, all sent at once, and
returns the seconds that took. Every load runs twice and the second counts: kernels compile in the
first.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def measure(run: Run, load: Load) -> list[dict[str, Any]]:
    """Return a row for each thing measured: `what`, and `seconds` or `tokens_per_s`."""
    rows: list[dict[str, Any]] = []
    run([(load.prompt, 2)])
    for batch in load.batches:
        first_s = min(run([(load.prompt, 1)] * batch) for _ in range(2))
        run([(load.prompt, load.decoded + 1)] * batch)
        all_s = run([(load.prompt, load.decoded + 1)] * batch)
        step_s = (all_s - first_s) / load.decoded
        rows.append({"what": f"decode step, batch {batch}", "seconds": step_s})
        if batch == load.many:
            rate = batch * load.prompt / first_s
            rows.append({"what": f"prefill {batch} x {load.prompt}", "tokens_per_s": rate})
    for length in load.long_prompts:
        run([(length, 1)])
        rows.append({"what": f"prompt of {length}", "seconds": run([(length, 1)])})
    lengths = mixed_lengths(load)
    run(lengths)
    rate = sum(output for _, output in lengths) / run(lengths)
    rows.append({"what": f"{len(lengths)} mixed requests", "tokens_per_s": rate})
    return rows


def compared(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what both measured, with `speed_ratio`: how many times as fast ours is.

    >>> compared([{"what": "a", "seconds": 2.0}], [{"what": "a", "seconds": 3.0}])
    [{'what': 'a', 'unit': 'seconds', 'ours': 2.0, 'peer': 3.0, 'speed_ratio': 1.5}]
    """
    found = {row["what"]: row for row in peers}
    rows = []
    for row in ours:
        unit = next(name for name in ("seconds", "tokens_per_s") if name in row)
        mine, other = row[unit], found[row["what"]][unit]
        ratio = other / mine if unit == "seconds" else mine / other
        rows.append(
            {"what": row["what"], "unit": unit, "ours": mine, "peer": other, "speed_ratio": ratio}
        )
    return rows
