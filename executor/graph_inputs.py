"""`GraphInputs`: where captured decode steps find their batch.

All that a batch is made of lies in one piece of memory, so that it comes to the device by one copy:
each copy between two steps leaves the GPU idle for some 8 us around it (three of them, measured on
an H200, were 0.7 % of a batch-1 step of an 8B model).
Shape letters: B captured batch, N blocks of a table row.
"""

from collections import deque

import numpy as np
import torch

from rankwright.executor.rank_batch import RankBatch

# Sets of host buffers: one that is being filled while copies of the steps before may still wait for
# the GPU to come to them.
NUM_HOST_SETS = 3
# Ids, positions and slots of a row that is there for the shape alone.
_PADDING = np.array([[0], [0], [-1]])
# Where each array begins: kernels load 16 bytes at a time.
_ALIGN_BYTES = 256


class _Arrays:
    """Ids, positions and slots, int64 [3, B]; lengths, int32 [B]; tables, int32 [B, N]."""

    def __init__(
        self, largest: int, max_blocks: int, device: torch.device, *, pinned: bool
    ) -> None:
        lens_at = _aligned(3 * largest * 8)
        self._tables_at = lens_at + _aligned(largest * 4)
        self._row_bytes = max_blocks * 4
        size = self._tables_at + largest * self._row_bytes
        self.memory = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.wide = self.memory[: 3 * largest * 8].view(torch.int64).view(3, largest)
        self.lens = self.memory[lens_at : lens_at + largest * 4].view(torch.int32)
        tables = self.memory[self._tables_at :].view(torch.int32)
        self.tables = tables.view(largest, max_blocks)

    def bytes_of(self, count: int) -> torch.Tensor:
        """Return the memory up to the table row of the last of `count` sequences."""
        return self.memory[: self._tables_at + count * self._row_bytes]


class _HostSet:
    """Arrays on the host, as numpy sees them, and when their copy to the device is done."""

    def __init__(self, arrays: _Arrays, *, on_gpu: bool) -> None:
        self.arrays = arrays
        self.wide, self.lens = arrays.wide.numpy(), arrays.lens.numpy()
        self.tables = arrays.tables.numpy()
        self.copied = torch.cuda.Event() if on_gpu else None


class GraphInputs:
    """Fixed places on the device, and the way of a batch to them.

    Attributes:
        wide: Token ids, positions and slots, int64 [3, B].
        lens: Context lengths, int32 [B].
        tables: Cache blocks, int32 [B, N].

    Args:
        largest: B of the largest batch.
        max_blocks: N.
        device: Where the graphs run.
    """

    def __init__(self, largest: int, max_blocks: int, device: torch.device) -> None:
        self._there = _Arrays(largest, max_blocks, device, pinned=False)
        self.wide, self.lens = self._there.wide, self._there.lens
        self.tables = self._there.tables
        self.wide[2].fill_(-1)
        on_gpu = device.type == "cuda"
        cpu = torch.device("cpu")
        self._host_sets = deque(
            _HostSet(_Arrays(largest, max_blocks, cpu, pinned=on_gpu), on_gpu=on_gpu)
            for _ in range(NUM_HOST_SETS)
        )

    def fill(self, batch: RankBatch, size: int) -> None:
        """Copy a decode batch to its places, without waiting for the device.

        Args:
            batch: Of decodes alone.
            size: What it is padded to: rows of context 0 that attend to and write nothing.
        """
        count = batch.num_tokens
        width = batch.block_tables_SN.shape[1]
        host = self._host_sets[0]
        self._host_sets.rotate(-1)
        if host.copied is not None:
            host.copied.synchronize()  # the copy of some steps before may still read it
        wide, lens = host.wide, host.lens
        if size > count:
            wide[:, count:size] = _PADDING
            lens[count:size] = 0
        wide[0, :count] = batch.token_ids_T
        wide[1, :count] = batch.positions_T
        wide[2, :count] = batch.slots_T
        lens[:count] = batch.context_lens_S
        host.tables[:count, :width] = batch.block_tables_SN
        self._there.bytes_of(count).copy_(host.arrays.bytes_of(count), non_blocking=True)
        if host.copied is not None:
            host.copied.record()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
