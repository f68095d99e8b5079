"""Which replica takes a request: a pure choice, so that it can be tested without a server."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica still has to do for the requests it holds.

    Attributes:
        replica: Its number in the plan.
        outstanding_tokens: Prompt tokens not yet answered plus output tokens that may still come.
        num_requests: Requests that it holds.
    """

    replica: int
    outstanding_tokens: int
    num_requests: int


def choose_replica(loads: Sequence[Load]) -> int:
    """Return the replica with the fewest outstanding tokens.

    Ties go to the one with fewer requests, then to the lower number, so that the choice does not
    depend on the order of `loads`.

    Raises:
        ValueError: `loads` is empty.

    >>> choose_replica([Load(0, 900, 1), Load(1, 40, 3), Load(2, 40, 2)])
    2
    """
    if not loads:
        raise ValueError("no replica to choose from")
    return min(
        loads, key=lambda load: (load.outstanding_tokens, load.num_requests, load.replica)
    ).replica
