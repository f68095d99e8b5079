"""Decode steps captured as CUDA graphs, one a batch size, collectives inside.

A graph replays fixed addresses, so inputs live in buffers that are filled before each replay. A
batch is padded to the next captured size: a padding row has context 0 (attends to nothing) and slot
-1 (writes nothing).
Shape letters: B captured batch, N blocks of a table row, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rankwright.executor.forward_context import ForwardContext
from rankwright.executor.models.decoder import DecoderStage
from rankwright.executor.step_batch import StepBatch

# Fine steps where one more padding row costs most; between 32 and 256 a GEMM's tile of 16 rows is
# filled either way.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# Largest captured batch: past it a step is long enough to hide its launches.
LARGEST = SIZES[-1]


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes to capture for up to `max_num_seqs` sequences.

    >>> capture_sizes(10)
    (1, 2, 4, 8, 12)
    """
    below = [size for size in SIZES if size < max_num_seqs]
    above = [size for size in SIZES if size >= max_num_seqs]
    return tuple(below + above[:1])


class DecodeGraphs:
    """Captured decode steps of one stage.

    Args:
        stage: Its layers.
        sizes: Batch sizes, ascending.
        max_blocks: Blocks a sequence can hold: the width of a block table row.
        block_tokens: Tokens of a block.
        hidden_size: D.
        dtype: Of activations.
        device: A CUDA device.
        cos_sin_PD: Rotary table.
        on_size: Called after each capture.
    """

    def __init__(
        self,
        stage: DecoderStage,
        *,
        sizes: tuple[int, ...],
        max_blocks: int,
        block_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        cos_sin_PD: torch.Tensor,
        on_size: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._stage = stage
        self._sizes = sizes
        self._block_tokens = block_tokens
        self._cos_sin_PD = cos_sin_PD
        largest = sizes[-1]
        # Token ids, positions and slots share a buffer, so that they are one copy.
        self._wide = torch.zeros(3, largest, dtype=torch.int64, device=device)
        self._lens = torch.zeros(largest, dtype=torch.int32, device=device)
        self._tables = torch.zeros(largest, max_blocks, dtype=torch.int32, device=device)
        self._host_wide = torch.zeros(3, largest, dtype=torch.int64, pin_memory=True)
        self._host_lens = torch.zeros(largest, dtype=torch.int32, pin_memory=True)
        self._host_tables = torch.zeros(largest, max_blocks, dtype=torch.int32, pin_memory=True)
        self._copied = torch.cuda.Event()
        self.hidden_BD = torch.zeros(largest, hidden_size, dtype=dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, torch.Tensor] = {}
        self._wide[2].fill_(-1)
        pool = torch.cuda.graph_pool_handle()
        # Largest first: smaller graphs then fit into the memory that it left in the pool.
        for size in reversed(sizes):
            self._capture(size, pool)
            on_size(size)

    @property
    def largest(self) -> int:
        """Largest batch that can be replayed."""
        return self._sizes[-1]

    def _run(self, size: int) -> torch.Tensor:
        context = ForwardContext(
            num_decodes=size,
            positions_T=self._wide[1, :size],
            slots_T=self._wide[2, :size],
            context_lens_S=self._lens[:size],
            block_tables_SN=self._tables[:size],
            cos_sin_PD=self._cos_sin_PD,
        )
        out = self._stage.forward(self._wide[0, :size], self.hidden_BD[:size], context)
        return out if self._stage.head is None else self._stage.logits(out)

    def _capture(self, size: int, pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels, and lets cuBLAS and NCCL make what may not be made in a capture.
            self._run(size)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._outputs[size] = self._run(size)
        self._graphs[size] = graph

    def fill(self, batch: StepBatch) -> None:
        """Copy a decode batch into the input buffers, without waiting for the device."""
        count = batch.num_sequences
        size = self.size_for(count)
        width = batch.block_tables_SN.shape[1]
        self._copied.synchronize()  # the last copy may still read the host buffers
        wide, lens, tables = (
            self._host_wide.numpy(),
            self._host_lens.numpy(),
            self._host_tables.numpy(),
        )
        wide[:, count:size] = np.array([[0], [0], [-1]])
        wide[0, :count] = batch.token_ids_T
        wide[1, :count] = batch.positions()
        wide[2, :count] = batch.slots(self._block_tokens)
        lens[count:size] = 0
        lens[:count] = batch.context_lens_S
        tables[:count, :width] = batch.block_tables_SN
        self._wide.copy_(self._host_wide, non_blocking=True)
        self._lens[:size].copy_(self._host_lens[:size], non_blocking=True)
        self._tables[:count].copy_(self._host_tables[:count], non_blocking=True)
        self._copied.record()

    def replay(self, count: int) -> torch.Tensor:
        """Return the output of `count` rows: hidden states, or logits on the last stage.

        The result is overwritten by the next replay.
        """
        size = self.size_for(count)
        self._graphs[size].replay()
        return self._outputs[size][:count]

    def size_for(self, count: int) -> int:
        """Return the smallest captured batch of at least `count`."""
        return next(size for size in self._sizes if size >= count)
