"""A leader whose KV cache a client can make smaller: one start of an engine plays many budgets."""

from typing import Any

from client import CAP
from rankwright.executor.engine import Leader


class CappedLeader(Leader):
    """Holds blocks back when told to, as if there were no memory for them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See `Leader`."""
        super().__init__(*arguments, **options)
        self._held: list[list[int]] = [[] for _ in self.scheduler.room.pools]

    def _take(self, data: bytes) -> None:
        if not data.startswith(CAP):
            super()._take(data)
            return
        asked = data.removeprefix(CAP)
        for pool, held in zip(self.scheduler.room.pools, self._held, strict=True):
            pool.give(held)
            blocks = min(int(asked), pool.num_blocks) if asked else pool.num_blocks
            held[:] = pool.take(pool.num_blocks - blocks)
