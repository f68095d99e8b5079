"""`NearMemory`: memory of each rank of a replica on one machine, which all of them can write.

On GPUs each rank's part is its GPU's own memory, which peers reach over NVLink or PCIe (PyTorch's
symmetric memory), and telling and waiting happen on streams, not on hosts. On CPUs it is one file
in memory, unlinked as soon as everybody has mapped it. Each part begins with words by which peers
tell that something is there; a word has one writer.
"""

import contextlib
import math
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from rankwright.executor.groups import Group
from rankwright.kernels.peer_words import await_count, tell

# Room for words at the start of each rank's part.
NUM_WORDS = 32
WORD_BYTES = 8 * NUM_WORDS
# Where its process is, for peers that wait for it on CPUs.
_PID_WORD = NUM_WORDS - 1
# A waiting CPU rank sleeps at most this long between two looks, and looks this often whether the
# one that it waits for still lives.
_NAP_S = 0.0002
_LOOK_S = 1.0
_TIMEOUT_S = 600.0
_FOLDER = Path("/dev/shm")


class NearMemory(Protocol):
    """What a rank does with the memory; ranks are named by their place in the replica."""

    def part(
        self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return memory of `rank` that begins `offset` bytes into its part; multiples of 16."""
        ...

    def tell(self, rank: int, word: int, count: int) -> None:
        """Write `count` into a word of `rank`, after all that was written before."""
        ...

    def wait(self, word: int, count: int, *, writer: int) -> None:
        """Wait until `writer` has written `count` or more into a word of this rank."""
        ...

    def aside(self, tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Do what follows on a stream of its own, after what made `tensor`, which it reads."""
        ...


class GpuMemory:
    """Memory of the GPUs of a replica.

    Args:
        group: The replica's ranks.
        num_bytes: Of each rank's part.
        device: This rank's GPU.

    Raises:
        RuntimeError: GPUs do not reach each other's memory.
    """

    def __init__(self, group: Group, num_bytes: int, device: torch.device) -> None:
        """All ranks of the group must call this together."""
        import torch.distributed._symmetric_memory as symmetric_memory

        assert group.process_group is not None
        self._memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, group.process_group)
        self._memory[:WORD_BYTES].zero_()
        self._words = self._memory[:WORD_BYTES].view(torch.int64)
        self._stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)

    def part(
        self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return memory of `rank`."""
        found: torch.Tensor = self._handle.get_buffer(rank, shape, dtype, offset // dtype.itemsize)
        return found

    def tell(self, rank: int, word: int, count: int) -> None:
        """Tell `rank` on the current stream."""
        tell(self._handle.buffer_ptrs_dev, rank, word, count)

    def wait(self, word: int, count: int, *, writer: int) -> None:
        """Let the current stream wait."""
        await_count(self._words, word, count)

    @contextlib.contextmanager
    def aside(self, tensor: torch.Tensor) -> Iterator[None]:
        """Do what follows on a stream of its own."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        tensor.record_stream(self._stream)


class HostMemory:
    """Memory of the CPU ranks of a replica: a file that all of them have mapped.

    Args:
        group: The replica's ranks.
        rank: This one.
        num_bytes: Of each rank's part.

    Raises:
        OSError: There is no room for it.
    """

    def __init__(self, group: Group, rank: int, num_bytes: int) -> None:
        """All ranks of the group must call this together."""
        self._num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._rank = group.ranks.index(rank)
        path: list[str | None] = [None]
        if self._rank == 0:
            path[0] = _new_file(self._num_bytes * group.size)
        dist.broadcast_object_list(path, group.ranks[0], group=group.process_group)
        if path[0] is None:
            raise OSError(f"{_FOLDER} has no room for {self._num_bytes * group.size} bytes")
        with open(path[0], "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8).view(group.size, -1)
        self._words = self._bytes[:, :WORD_BYTES].numpy().view(np.int64)
        self._words[self._rank, _PID_WORD] = os.getpid()
        dist.barrier(group=group.process_group)
        if self._rank == 0:
            os.unlink(path[0])

    def part(
        self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return memory of `rank`."""
        size = math.prod(shape) * dtype.itemsize
        return self._bytes[rank, offset : offset + size].view(dtype).view(shape)

    def tell(self, rank: int, word: int, count: int) -> None:
        """Tell `rank`; what was stored before is seen before (x86-64 keeps the order of stores)."""
        self._words[rank, word] = count

    def wait(self, word: int, count: int, *, writer: int) -> None:
        """Wait.

        Raises:
            ConnectionError: The writer's process is gone.
            TimeoutError: It said nothing for ten minutes.
        """
        words = self._words[self._rank]
        started = looked = time.monotonic()
        while words[word] < count:
            now = time.monotonic()
            time.sleep(min(_NAP_S, (now - started) / 4))
            if now - looked < _LOOK_S:
                continue
            looked = now
            if not Path(f"/proc/{self._words[writer, _PID_WORD]}").exists():
                raise ConnectionError(f"the process of rank {writer} of the replica is gone")
            if now - started > _TIMEOUT_S:
                raise TimeoutError(
                    f"rank {writer} of the replica said nothing for {_TIMEOUT_S:.0f} s"
                )

    def aside(self, tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Do what follows here: a copy within memory is as fast as anything it could overlap."""
        return contextlib.nullcontext()


def _new_file(num_bytes: int) -> str | None:
    """Return the name of a file of so many bytes in memory; None: there is no room for it."""
    number, name = tempfile.mkstemp(prefix="rankwright-", dir=_FOLDER)
    try:
        # Not only its length: a page that cannot be had later would end the process.
        os.posix_fallocate(number, 0, num_bytes)
    except OSError:
        os.unlink(name)
        return None
    finally:
        os.close(number)
    return name
