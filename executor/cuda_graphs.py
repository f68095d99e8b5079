"""Decode steps captured as CUDA graphs, one a batch size, collectives inside.

A graph replays fixed addresses, so inputs live in buffers that are filled before each replay. A
batch is padded to the next captured size: a padding row has context 0 (attends to nothing) and slot
-1 (writes nothing). Input tokens that the step before draws are put in by the graph itself.
Shape letters: B captured batch, N blocks of a table row, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rankwright.executor.forward_context import ForwardContext
from rankwright.executor.graph_inputs import GraphInputs
from rankwright.executor.models.decoder import DecoderStage
from rankwright.executor.rank_batch import Parts, RankBatch
from rankwright.kernels.token_feed import feed_tokens

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
        parts: What of each batch this rank computes.
        hidden_size: D.
        dtype: Of activations.
        device: A CUDA device; on the meta device the steps run and nothing is captured.
        cos_sin_PD: Rotary table.
        drawn_R: Where each step leaves the tokens that it draws; None where ranks are not told.
        on_size: Called after each capture.
    """

    def __init__(
        self,
        stage: DecoderStage,
        *,
        sizes: tuple[int, ...],
        max_blocks: int,
        parts: Parts,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        cos_sin_PD: torch.Tensor,
        drawn_R: torch.Tensor | None = None,
        on_size: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._stage = stage
        self._sizes = sizes
        self._parts = parts
        self._cos_sin_PD = cos_sin_PD
        largest = sizes[-1]
        self._inputs = GraphInputs(largest, max_blocks, device)
        self._drawn_R = drawn_R
        is_real = device.type == "cuda"
        self.hidden_BD = torch.zeros(largest, hidden_size, dtype=dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, torch.Tensor] = {}
        capture: Callable[[int], object] = self._run
        if is_real:
            # One stream for all: cuBLAS keeps a workspace for each that it has run on.
            capture = partial(self._capture, torch.cuda.graph_pool_handle(), torch.cuda.Stream())
        # Largest first: smaller graphs then fit into the memory that it left in the pool.
        for size in reversed(sizes):
            capture(size)
            on_size(size)

    @property
    def largest(self) -> int:
        """Largest batch that can be replayed."""
        return self._sizes[-1]

    def _run(self, size: int) -> torch.Tensor:
        inputs = self._inputs
        context = ForwardContext(
            num_decodes=size,
            positions_T=inputs.wide[1, :size],
            slots_T=inputs.wide[2, :size],
            context_lens_S=inputs.lens[:size],
            block_tables_SN=inputs.tables[:size],
            cos_sin_PD=self._cos_sin_PD,
            parts=self._parts,
        )
        ids_T = inputs.wide[0, :size]
        if self._drawn_R is not None:
            ids_T = feed_tokens(ids_T, self._drawn_R)
        out = self._stage.forward(ids_T, self.hidden_BD[:size], context)
        return out if self._stage.head is None else self._stage.logits(out)

    def _capture(self, pool: Any, stream: torch.cuda.Stream, size: int) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels, and lets cuBLAS and NCCL make what may not be made in a capture.
            self._run(size)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._outputs[size] = self._run(size)
        self._graphs[size] = graph

    def fill(self, batch: RankBatch) -> None:
        """Copy a decode batch into the input buffers, without waiting for the device."""
        self._inputs.fill(batch, self.size_for(batch.num_tokens))

    def replay(self, count: int) -> torch.Tensor:
        """Return the output of the batch that `count` rows are padded to.

        Hidden states, or logits on the last stage, with attention DP those of all ranks' batches.
        The result is overwritten by the next replay.
        """
        size = self.size_for(count)
        self._graphs[size].replay()
        return self._outputs[size]

    def size_for(self, count: int) -> int:
        """Return the smallest captured batch of at least `count`."""
        return next(size for size in self._sizes if size >= count)
