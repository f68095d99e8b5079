"""What every way to run ranks offers to the session that owns them."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rankwright.planner.plan import RankPlan


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the ranks ended.

    Attributes:
        rank: The first that ended; None where only what started them did.
        error: One line.
        log: File with the rest.
        agent: What started them.
    """

    rank: RankPlan | None
    error: str
    log: Path
    agent: str = "torchrun"


class Ranks(Protocol):
    """Ranks of a plan, from their start to their end; each writes `rank-<r>.log`."""

    def doing(self) -> str:
        """Return in a few words what they do now, for who waits for them to be ready."""
        ...

    async def first_end(self) -> None:
        """Return when a rank, or what started them, has ended."""
        ...

    async def end(self, within_s: float) -> bool:
        """Return whether all have ended by themselves within `within_s` seconds."""
        ...

    async def failure(self) -> Failure:
        """Return why a rank ended, and kill the rest; for when something has gone wrong."""
        ...

    async def kill(self) -> None:
        """Kill what is left, and wait until it is gone."""
        ...


def last_line(path: Path) -> str:
    """Return the last line of `path` that is not blank; empty where there is none."""
    lines = tail(path, 1)
    return lines[0].strip() if lines else ""


def tail(path: Path, num_lines: int) -> list[str]:
    """Return the last lines of `path` that are not blank; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))  # enough for any traceback
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-num_lines:]


def describe_exit(code: int, log: Path) -> str:
    """Return how a process ended: `code` as `subprocess` counts it, its last line in `log`."""
    if code >= 0:
        last = last_line(log)
        return f"exit code {code}" + (f": {last}" if last else "")
    if -code == signal.SIGKILL:
        return "killed by SIGKILL; the kernel does so when memory runs out (see dmesg)"
    return f"killed by {signal.Signals(-code).name}"
