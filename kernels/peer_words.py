"""Words in the memory of ranks of one machine: a rank tells another that something is there.

A rank writes data into a peer's memory first, by copies of the same stream, and then a count into a
word of the peer; the peer's stream waits until the word has come to that count. Neither host takes
part. One thread waits, on a stream whose next work needs the data, so that it takes no
multiprocessor from kernels that run meanwhile.

The counts go up by one and each word has one writer. Memory of CPUs needs no kernel: see
`executor/near_memory.py`.
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import jit, tl


@jit(do_not_specialize=("peer", "word", "count"))
def _tell_kernel(table_address, peer, word, count):
    table = table_address.to(tl.pointer_type(tl.int64))
    base = tl.load(table + peer).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(base + word, tl.cast(count, tl.int64), sem="release", scope="sys")


@jit(do_not_specialize=("word", "count"))
def _await_kernel(told_ptr, word, count):
    while tl.atomic_add(told_ptr + word, 0, sem="acquire", scope="sys") < count:
        pass


def tell(table_address: int, peer: int, word: int, count: int) -> None:
    """Write `count` into a word of a peer, once all that this stream did before is done.

    Args:
        table_address: On the device, addresses of every rank's memory, int64 [ranks]; each begins
            with its words.
        peer: Whose.
        word: Which, counted in int64.
        count: What.
    """
    _tell_kernel[(1,)](table_address, peer, word, count, num_warps=1)


def await_count(words: torch.Tensor, word: int, count: int) -> None:
    """Let this stream wait until a peer has written `count` or more into a word of this rank.

    Args:
        words: This rank's, int64.
        word: Which.
        count: What to wait for.
    """
    _await_kernel[(1,)](words, word, count, num_warps=1)
