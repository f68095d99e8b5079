"""`sustained_s`: how long a call takes on a GPU that has settled under it.

A board at its power limit lowers its clock while it works and raises it in every pause, within
tenths of a second. What a planner wants is what it keeps up. So there is no pause here: calls wait
in the stream before the ones ahead of them end, marks between them are read afterwards, and what
was done before the board settled is not counted.
"""

import statistics
from collections import deque
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch

# Under a full load an H100 and an H200 lower their clocks within some 0.1 s; power limits are held
# over about a second.
SETTLE_S = 1.0
SAMPLE_S = 0.5
# Rounds in the stream: enough that a host held up for some milliseconds does not empty it, few
# enough that it ends soon after the last one that counts.
QUEUED = 4


class Mark(Protocol):
    """A place between two pieces of work on a device."""

    def wait(self) -> None:
        """Return once the device has come here."""

    def until_s(self, later: Self) -> float:
        """Return the seconds from here to a later place; both must have been reached."""
        ...


_M = TypeVar("_M", bound=Mark)


class CudaMark:
    """A place in the current stream."""

    def __init__(self) -> None:
        """Put the place behind all that was launched so far."""
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def wait(self) -> None:
        """Return once the device has come here."""
        self._event.synchronize()

    def until_s(self, later: Self) -> float:
        """Return the seconds from here to a later place; both must have been reached."""
        return float(self._event.elapsed_time(later._event)) / 1e3


def sustained_s(
    launch: Callable[[], object],
    mark: Callable[[], _M],
    *,
    settle_s: float = SETTLE_S,
    sample_s: float = SAMPLE_S,
) -> float:
    """Return the seconds of a round of work, the median of those after the device has settled.

    Args:
        launch: Starts one round on the device and returns without waiting for it.
        mark: Makes a mark behind all that was launched.
        settle_s: Seconds of work that are not counted.
        sample_s: Seconds of work that are; at least one round is.
    """
    marks = deque([mark()])
    counted: list[float] = []
    done_s = 0.0
    while done_s < settle_s + sample_s or not counted:
        launch()
        marks.append(mark())
        if len(marks) <= QUEUED:
            continue
        first = marks.popleft()
        marks[0].wait()
        spent_s = first.until_s(marks[0])
        if done_s >= settle_s:
            counted.append(spent_s)
        done_s += spent_s
    marks[-1].wait()
    return statistics.median(counted)
