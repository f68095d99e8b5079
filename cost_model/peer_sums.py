"""How the executor sums over the GPUs of one machine, by size: over peers' memory, or by NCCL.

One table for both: the executor chooses by it, and the cost model prices by it.
"""

from dataclasses import dataclass
from typing import Literal

SumAlgorithm = Literal["pushed", "one_shot", "two_shot", "library"]


@dataclass(frozen=True, slots=True)
class PeerSums:
    """Up to how many bytes of a rank's part each form over peers' memory is taken.

    Args:
        pushed_bytes: Every rank writes its part into the memory of all others; values of 16 bits.
        one_shot_bytes: Above that: every rank reads all parts.
        two_shot_bytes: Above that: every rank sums its share of the rows and writes it to all; 0:
            none.
    """

    pushed_bytes: int = 0
    one_shot_bytes: int = 0
    two_shot_bytes: int = 0

    @property
    def max_bytes(self) -> int:
        """The largest part that is not left to NCCL."""
        return max(self.pushed_bytes, self.one_shot_bytes, self.two_shot_bytes)

    def algorithm(self, size_bytes: float) -> SumAlgorithm:
        """Return how parts of `size_bytes` are summed.

        >>> PeerSums(one_shot_bytes=10, two_shot_bytes=20).algorithm(15)
        'two_shot'
        """
        if size_bytes <= self.pushed_bytes:
            return "pushed"
        if size_bytes <= self.one_shot_bytes:
            return "one_shot"
        return "two_shot" if size_bytes <= self.two_shot_bytes else "library"


# By ranks. One-shot moves (n - 1) times the part to each of n ranks; two-shot and a ring move
# 2 (n - 1) / n times it, but meet twice or start later. On two ranks all move the same, so one-shot
# ends where its memory does. The others: where vLLM 0.26 leaves its own kernels on sm_90 for NCCL
# (4 ranks: of its one-shot, vllm-project/vllm pull request 24532, 10 us against 21 us at 0.5 MB).
_TABLE: dict[int, PeerSums] = {
    2: PeerSums(one_shot_bytes=32 << 20),
    3: PeerSums(one_shot_bytes=1 << 20),
    4: PeerSums(one_shot_bytes=512 << 10),
    5: PeerSums(one_shot_bytes=256 << 10),
    6: PeerSums(one_shot_bytes=256 << 10),
    8: PeerSums(one_shot_bytes=256 << 10),
}
_NONE = PeerSums()


def peer_sums(num_ranks: int) -> PeerSums:
    """Return how `num_ranks` ranks of one machine sum.

    >>> peer_sums(2).algorithm(1 << 20), peer_sums(16).algorithm(1)
    ('one_shot', 'library')
    """
    return _TABLE.get(num_ranks, _NONE)
