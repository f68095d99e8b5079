"""`BlockPool`: who holds which block of the paged KV cache, and what full blocks hold.

Bookkeeping only, no tensors. A full block is known by the hash of its tokens and of all before
them, so that a request whose prompt begins like an earlier one shares its blocks. A block that
nobody holds stays known until it is needed; the one longest unused goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

# What stands before the first block.
ROOT = b""


def chain_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of a block of `tokens` after blocks of hash `before`.

    128 bits: that two of a billion different blocks share one has a chance of 10**-21.

    >>> chain_hash(ROOT, [1, 2]) == chain_hash(chain_hash(ROOT, [0]), [1, 2])
    False
    """
    data = np.asarray(tokens, dtype=np.int64).tobytes()
    return hashlib.blake2b(before + data, digest_size=16).digest()


class BlockPool:
    """Hands out block numbers `0 .. num_blocks - 1`, each to one or more holders.

    >>> pool = BlockPool(4)
    >>> pool.take(3), pool.num_free
    ([0, 1, 2], 1)
    >>> pool.give([1]); pool.num_free
    2
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # known, the longest unused first

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free) + len(self._unheld)

    def take(self, count: int) -> list[int]:
        """Return `count` blocks nobody holds; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._unheld.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def give(self, blocks: Iterable[int]) -> None:
        """Take blocks back from one holder, in the order in which they may be used again.

        A block that was not handed out is our own mistake.
        """
        for block in blocks:
            assert block in self._holders, f"block {block} was given back twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._hash_of:
                self._unheld[block] = None
            else:
                self._free.append(block)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks that hold the first of `hashes`, up to the first unknown one."""
        found = []
        for one in hashes:
            block = self._block_of.get(one)
            if block is None:
                break
            found.append(block)
        return found

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` nobody holds."""
        return sum(block in self._unheld for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold known blocks once more."""
        for block in blocks:
            self._unheld.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def know(self, block: int, content: bytes) -> None:
        """Note what a held block holds; of two with the same content the first stays known."""
        assert block in self._holders
        if block not in self._hash_of and content not in self._block_of:
            self._hash_of[block] = content
            self._block_of[content] = block
