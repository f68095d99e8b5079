"""`BlockPool`: which blocks of the paged KV cache are free. Bookkeeping only, no tensors."""


class BlockPool:
    """Hands out block numbers `0 .. num_blocks - 1`.

    >>> pool = BlockPool(4)
    >>> pool.take(3), pool.num_free
    ([0, 1, 2], 1)
    >>> pool.give([1]); pool.num_free
    2
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return `count` free blocks; the caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def give(self, blocks: list[int]) -> None:
        """Take blocks back; a block that was not handed out is our own mistake."""
        for block in blocks:
            assert block in self._taken, f"block {block} was given back twice"
            self._taken.remove(block)
            self._free.append(block)
