"""Finds the ranks that Ray's actors have started on this machine."""

import contextlib
from pathlib import Path

# In the environment of ranks that Ray's actors start, and of no others.
RANK_MARK = b"/rankwright-ray-"


def pids_of_ranks() -> dict[int, int]:
    """Process ids of the ranks that Ray's actors have started, by rank."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            whole = (path / "environ").read_bytes()
            if RANK_MARK in whole and b"RANK=" in whole:
                environ = whole.split(b"\0")
                found[int(dict(e.split(b"=", 1) for e in environ if e)[b"RANK"])] = int(path.name)
    return found
