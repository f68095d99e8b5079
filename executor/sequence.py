"""`Sequence`: one request as the scheduler sees it."""

from dataclasses import dataclass, field

from rankwright.executor.messages import Sampling


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way: its tokens, how many are in the cache, and the blocks it holds."""

    request_id: str
    tokens: list[int]
    num_prompt: int
    sampling: Sampling
    seed: int
    max_tokens: int  # prompt and output
    stop_ids: frozenset[int] = frozenset()  # tokens that end it
    num_cached: int = 0  # scheduled into the cache, in flight or done
    blocks: list[int] = field(default_factory=list)
    part: int = 0  # whose pool they are of
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as needed
    num_known: int = 0  # blocks that the pool knows
    num_pending: int = 0  # tokens that batches in flight draw for it
    drawn_step: int = -1  # the last batch that samples it, and its row there
    drawn_row: int = -1
    finished: bool = False

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def in_flight(self) -> bool:
        """Whether a batch that samples it has not come back."""
        return self.num_pending > 0

    @property
    def num_tokens(self) -> int:
        """Its tokens, those in flight too."""
        return len(self.tokens) + self.num_pending
