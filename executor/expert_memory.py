"""`ExpertMemory`: GPU memory through which the ranks of a TP group hand tokens to experts and back.

For steps that a CUDA graph holds, where no host can read how many tokens go where; see
`kernels/expert_exchange.py`. It is opened only where `RANKWRIGHT_EXPERT_EXCHANGE=peers` asks for
it: checked with Triton's interpreter and by compiling for Hopper, it has not run between GPUs yet.
Shape letters: T tokens of each rank, K experts a token, R ranks, D hidden size.
"""

import torch
import torch.distributed as dist

from rankwright.kernels.all_reduce import MAX_PROGRAMS
from rankwright.kernels.expert_exchange import (
    ExchangeMemory,
    combine_tokens,
    dispatch_tokens,
)

# Tokens of a rank at most: the largest batch that is captured. Room for larger ones would be read
# by products of mostly nothing.
MAX_TOKENS = 256
_ALIGN_BYTES = 16


class ExpertMemory:
    """Room for some tokens of each rank, shared over one group.

    One serves all layers, one after another, that agree in what they are given here.

    Args:
        group: Ranks on one machine that reach each other's memory.
        top_k: Experts a token.
        dim: Values of a token.
        dtype: Of the values.
        moe_tp: Ranks that share each expert.
        device: This rank's GPU.
        max_tokens: Of each rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        top_k: int,
        dim: int,
        dtype: torch.dtype,
        moe_tp: int,
        device: torch.device,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """All ranks of the group must call this together.

        Raises:
            RuntimeError: GPUs do not reach each other's memory.
        """
        import torch.distributed._symmetric_memory as symmetric_memory

        self._ranks = group.size()
        rows = max_tokens * self._ranks
        pair_bytes = _aligned(rows * top_k * 4)
        row_bytes = _aligned(rows * dim * dtype.itemsize)
        words = MAX_PROGRAMS * self._ranks
        starts = [0, pair_bytes, 2 * pair_bytes, 2 * pair_bytes + row_bytes]
        signals = starts[-1] + row_bytes
        memory = symmetric_memory.empty(signals + words * 4, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(memory, group)
        memory.zero_()
        self._keep = memory, handle
        self._slots = memory[:pair_bytes].view(torch.int32)
        self._weights = memory[pair_bytes : 2 * pair_bytes].view(torch.float32)
        self._rows = memory[starts[2] : starts[3]].view(dtype)
        self._parts = memory[starts[3] : signals].view(dtype)
        self._shape = top_k, dim
        self._places = ExchangeMemory(
            table_address=handle.buffer_ptrs_dev,
            words=memory[signals:].view(torch.int32),
            epochs=torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
            signal_word=signals // 4,
            slots_word=starts[0] // 4,
            weights_word=starts[1] // 4,
            rows_offset=starts[2] // dtype.itemsize,
            parts_offset=starts[3] // dtype.itemsize,
            capacity=max_tokens,
            rank=group.rank(),
            world_size=self._ranks,
            moe_tp=moe_tp,
        )
        # A peer that writes before this memory is cleared would wait for ever.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        slots_TK: torch.Tensor,
        starts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what arrives here: rows [R T, D], weights and this rank's slots [R T, K].

        Args:
            x_TD: This rank's tokens, as many on every rank.
            weights_TK: float32, from `route`.
            slots_TK: int32, from `route`, counted over all ranks.
            starts: int32, first slot of each rank's experts, and one past the last of all.
        """
        dispatch_tokens(x_TD, weights_TK, slots_TK, starts, self._places)
        top_k, dim = self._shape
        count = self._ranks * len(x_TD)
        return (
            self._rows[: count * dim].view(count, dim),
            self._weights[: count * top_k].view(count, top_k),
            self._slots[: count * top_k].view(count, top_k),
        )

    def parts(self, num_rows: int) -> torch.Tensor:
        """Return where to write what this rank makes of the rows that arrived, [R T, D]."""
        dim = self._shape[1]
        return self._parts[: num_rows * dim].view(num_rows, dim)

    def combine(
        self, slots_TK: torch.Tensor, starts: torch.Tensor, base_TD: torch.Tensor | None
    ) -> torch.Tensor:
        """Return [T, D]: the sum of what all ranks made of this rank's tokens, and of `base_TD`."""
        out_TD = self._parts.new_empty(len(slots_TK), self._shape[1])
        return combine_tokens(out_TD, slots_TK, starts, self._places, base_TD=base_TD)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
