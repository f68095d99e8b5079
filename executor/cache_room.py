"""`CacheRoom`: the KV blocks of sequences: who gets which, and which prompts share theirs.

With attention DP each rank of a stage has sequences, and a pool of blocks, of its own (a part).
With the prefix cache, full blocks stay known by their tokens, and a sequence that starts (again)
takes those that its tokens begin with instead of computing them. Steps run in the order in which
they are issued, so a block is known as soon as the step that fills it is issued.
"""

from collections.abc import Iterable

from rankwright.executor.block_pool import ROOT, BlockPool, chain_hash
from rankwright.executor.sequence import Sequence


class CacheRoom:
    """Blocks of all parts.

    Args:
        num_blocks: Blocks of each part.
        block_tokens: Tokens of a block.
        num_parts: Ranks with sequences of their own.
        prefix_cache: Share blocks of equal tokens.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, *, num_parts: int, prefix_cache: bool
    ) -> None:
        self.pools = tuple(BlockPool(num_blocks) for _ in range(num_parts))
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache

    @property
    def num_free_blocks(self) -> int:
        """Blocks of all parts that nobody holds."""
        return sum(pool.num_free for pool in self.pools)

    def begin(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Give a sequence the known blocks that it begins with; return whether it finds room.

        Its whole prompt must, or two half prompts could wait for each other.
        """
        known = self._known_blocks(sequence)
        if not self._has_room(sequence.part, len(sequence.tokens) + 1, known, running):
            return False
        self.pools[sequence.part].share(known)
        sequence.blocks = known
        sequence.num_known = len(known)
        sequence.num_cached = len(known) * self.block_tokens
        return True

    def is_full(self, sequence: Sequence) -> bool:
        """Whether another token of it needs another block."""
        return sequence.num_cached >= len(sequence.blocks) * self.block_tokens

    def missing(self, sequence: Sequence, count: int) -> int:
        """Return how many blocks its part lacks to hold `count` more tokens of it."""
        return self._needed(sequence, count) - self.pools[sequence.part].num_free

    def grow(self, sequence: Sequence, count: int) -> None:
        """Give it blocks for `count` more tokens, which are there."""
        needed = self._needed(sequence, count)
        if needed > 0:
            sequence.blocks += self.pools[sequence.part].take(needed)

    def _needed(self, sequence: Sequence, count: int) -> int:
        return -(-(sequence.num_cached + count) // self.block_tokens) - len(sequence.blocks)

    def take_back(self, sequence: Sequence) -> None:
        """Take its blocks; the last first, as more sequences begin alike than end alike."""
        self.pools[sequence.part].give(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.num_cached = sequence.num_known = 0

    def know(self, sequence: Sequence) -> None:
        """Tell the pool of blocks that are full of tokens that are known here."""
        count = min(sequence.num_cached, len(sequence.tokens)) // self.block_tokens
        if not self._prefix_cache or count <= sequence.num_known:
            return
        self._hash_blocks(sequence, count)
        for index in range(sequence.num_known, count):
            self.pools[sequence.part].know(sequence.blocks[index], sequence.hashes[index])
        sequence.num_known = count

    def unreserved(self, part: int, running: Iterable[Sequence]) -> int:
        """Return the free blocks of `part` that tokens of those `running` there do not need."""
        reserved = sum(
            max(0, -(-(other.num_tokens + 1) // self.block_tokens) - len(other.blocks))
            for other in running
            if other.part == part
        )
        return max(self.pools[part].num_free - reserved, 0)

    def _has_room(
        self, part: int, tokens: int, known: list[int], running: Iterable[Sequence]
    ) -> bool:
        """Whether a sequence of `tokens` finds room, with `known` blocks that it shares."""
        here = [other for other in running if other.part == part]
        unheld = self.pools[part].num_unheld(known)
        needed = -(-tokens // self.block_tokens) - len(known) + unheld
        return needed <= self.unreserved(part, here) or not here

    def _known_blocks(self, sequence: Sequence) -> list[int]:
        """Return the blocks that the sequence's tokens begin with; its last token is computed."""
        if not self._prefix_cache:
            return []
        count = (len(sequence.tokens) - 1) // self.block_tokens
        self._hash_blocks(sequence, count)
        return self.pools[sequence.part].find(sequence.hashes[:count])

    def _hash_blocks(self, sequence: Sequence, count: int) -> None:
        """Have the hashes of its first `count` blocks."""
        for index in range(len(sequence.hashes), count):
            before = sequence.hashes[-1] if sequence.hashes else ROOT
            first = index * self.block_tokens
            tokens = sequence.tokens[first : first + self.block_tokens]
            sequence.hashes.append(chain_hash(before, tokens))
