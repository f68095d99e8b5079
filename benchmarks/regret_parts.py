"""Single runs of the regret benchmark on disk: one file for a job, a pass and a replica.

Each is written when its run is done, so that a benchmark that is cut off at any moment leaves what
it has measured, and the next call runs only what is missing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from regret_scenarios import Job

# Rates of replicas add up; of the rest the worst counts.
_SUMMED = ("output_tokens_per_s",)


def write_part(
    folder: Path, job: Job, row: Mapping[str, float], *, number: int, replica: int, dp: int
) -> None:
    """Keep what pass `number` of `job` gave on `replica` of `dp`."""
    key = hashlib.sha256(json.dumps(asdict(job)).encode()).hexdigest()[:16]
    path = folder / f"run-{key}-pass{number}-{replica}of{dp}.json"
    content = {"job": asdict(job), "pass": number, "replica": replica, "dp": dp, "row": dict(row)}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(path)


def read_parts(folder: Path) -> dict[Job, dict[int, dict[str, float]]]:
    """Return the figures of each job that all replicas have run, by pass."""
    rows: dict[tuple[Job, int, int], dict[int, dict[str, float]]] = {}
    for path in sorted(folder.glob("run-*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        key = Job(**part["job"]), part["pass"], part["dp"]
        rows.setdefault(key, {})[part["replica"]] = part["row"]
    found: dict[Job, dict[int, dict[str, float]]] = {}
    for (job, number, dp), of_replica in rows.items():
        if len(of_replica) == dp:
            found.setdefault(job, {})[number] = joined(list(of_replica.values()))
    return found


def joined(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the figures of all replicas together: rates add up, the slowest one waits longest.

    >>> joined([{"output_tokens_per_s": 2.0, "tpot_s": 3.0}] * 2)
    {'output_tokens_per_s': 4.0, 'tpot_s': 3.0}
    """
    return {
        key: sum(row[key] for row in rows) if key in _SUMMED else max(row[key] for row in rows)
        for key in rows[0]
    }
