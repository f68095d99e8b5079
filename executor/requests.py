"""What takes requests, as the server and what streams texts see it: one front end, or several."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from rankwright.executor.front_end import Replica
from rankwright.executor.messages import Sampling, Tokens


class Requests(Protocol):
    """The way to all replicas of a launch; `FrontEnd` says what each member means."""

    @property
    def replicas(self) -> Mapping[int, Replica]:
        """Those whose leaders said hello, by number."""
        ...

    @property
    def lost(self) -> asyncio.Event:
        """Set when a leader has hung up."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether every replica takes requests."""
        ...

    @property
    def num_outstanding(self) -> int:
        """Requests that are not finished."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of one request that every replica takes."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...

    async def idle(self) -> None:
        """Return when no request is outstanding."""
        ...

    def stalled(self, after_s: float) -> list[int]:
        """Replicas that hold requests and have been silent for so long."""
        ...

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Tokens, None]:
        """Yield the tokens of one request as they come."""
        ...

    def abort_all(self, error: str) -> None:
        """End every outstanding request with `error`."""
        ...
