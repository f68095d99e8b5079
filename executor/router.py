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
        tokens_per_s: How fast it is; only the ratio to the others' counts.
        slots: Requests that it runs at once; None: as many as it holds.
    """

    replica: int
    outstanding_tokens: int
    num_requests: int
    tokens_per_s: float = 1.0
    slots: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether one request more would wait for another to end."""
        return self.slots is not None and self.num_requests >= self.slots

    def done_after_s(self, new_tokens: int) -> float:
        """Return about when it would be done with `new_tokens` more."""
        return (self.outstanding_tokens + new_tokens) / self.tokens_per_s


def choose_replica(loads: Sequence[Load], new_tokens: int = 0) -> int:
    """Return the replica that would be done first: of alike ones, that with the fewest tokens.

    One whose batch has room comes before one where the request would wait. Ties go to the one with
    fewer requests, then to the lower number, so that the choice does not depend on the order of
    `loads`.

    Args:
        loads: Of all replicas that run.
        new_tokens: Of the request: where replicas are unlike, its length counts.

    Raises:
        ValueError: `loads` is empty.

    >>> choose_replica([Load(0, 900, 1), Load(1, 40, 3), Load(2, 40, 2)])
    2
    """
    if not loads:
        raise ValueError("no replica to choose from")
    return min(
        loads,
        key=lambda load: (
            load.is_full,
            load.done_after_s(new_tokens),
            load.num_requests,
            load.replica,
        ),
    ).replica
