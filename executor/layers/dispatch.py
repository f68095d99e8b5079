"""Tokens go to the ranks that hold their experts, and to no other, and come back.

With attention DP each rank has tokens of its own. Each is sent once to every rank that holds some
of its experts, with the slots and weights that routing gave it, in one all-to-all; what those ranks
made of it comes back in another and is added up in the order of ranks. How many tokens go where is
known on the devices only, so counts are exchanged first and read by the host, which a CUDA graph
cannot do.
Shape letters: T tokens of this rank, K experts a token, E ranks that share the experts out, R ranks
of the TP group, N rows that are sent, M rows that arrive, D hidden, B bytes of a packed row.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from rankwright.executor.groups import Group

# Every row begins where 16-byte loads can.
_ALIGN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Arrived:
    """Tokens of all ranks with experts here, as `run_experts` takes them.

    Args:
        x_MD: Rows; strided.
        weights_MK: float32.
        slots_MK: int32, this rank's slots; -1: another rank's.
    """

    x_MD: torch.Tensor
    weights_MK: torch.Tensor
    slots_MK: torch.Tensor


class Dispatch:
    """Tokens of one layer on their way: `arrived` waits for them, `combine` brings parts back.

    Args:
        group: The TP group.
        slots_of_ranks: First slot, and one past the last, of each of the E ranks.
        ep_rank: Which of them this rank is among.
        x_TD: This rank's tokens.
        weights_TK: float32, from `route`.
        slots_TK: int32, from `route`, counted over all ranks.
        counted_T: 0 for tokens of padding, which stay; None: there are none.
    """

    def __init__(
        self,
        group: Group,
        slots_of_ranks: tuple[tuple[int, int], ...],
        ep_rank: int,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        slots_TK: torch.Tensor,
        counted_T: torch.Tensor | None = None,
    ) -> None:
        """Start sending; all ranks of the group must call this together."""
        self._group = group
        self._slots = slots_of_ranks[ep_rank]
        self._shape, self._dtype = x_TD.shape, x_TD.dtype
        self._top_k = slots_TK.shape[1]
        goes_RT = _destinations(slots_TK, slots_of_ranks, group.size // len(slots_of_ranks))
        if counted_T is not None:
            goes_RT &= counted_T > 0
        sent_R = goes_RT.sum(1)
        arriving_R = torch.empty_like(sent_R)
        dist.all_to_all_single(arriving_R, sent_R, group=group.process_group)
        self._sent, self._arriving = torch.stack([sent_R, arriving_R]).tolist()
        self._tokens_N = goes_RT.nonzero()[:, 1]
        packed_NB = _packed(x_TD, weights_TK, slots_TK, self._tokens_N)
        self._arrived_MB = packed_NB.new_empty(sum(self._arriving), packed_NB.shape[1])
        self._work = self._all_to_all(self._arrived_MB, packed_NB, self._arriving, self._sent)
        self._packed_NB: torch.Tensor | None = packed_NB  # until it is sent

    def arrived(self) -> Arrived:
        """Return the rows that came here, once they have."""
        self._work.wait()
        self._packed_NB = None
        head, start, columns = _row(self._top_k, self._shape[1], self._dtype)
        first, stop = self._slots
        slots_MK = self._arrived_MB[:, :head].view(torch.int32)
        here_MK = (slots_MK >= first) & (slots_MK < stop)
        return Arrived(
            self._arrived_MB[:, start : start + columns].view(self._dtype),
            self._arrived_MB[:, head : 2 * head].view(torch.float32).contiguous(),
            torch.where(here_MK, slots_MK - first, -1),
        )

    def combine(self, parts_MD: torch.Tensor) -> torch.Tensor:
        """Return [T, D]: the sum of what all ranks made of each token of this rank.

        Args:
            parts_MD: What this rank made of the rows that arrived.
        """
        del self._arrived_MB
        parts_ND = parts_MD.new_empty(len(self._tokens_N), parts_MD.shape[1])
        self._all_to_all(parts_ND, parts_MD.contiguous(), self._sent, self._arriving).wait()
        out_TD = torch.zeros(self._shape, dtype=torch.float32, device=parts_MD.device)
        # One rank after another: a rank has a token once, so that no two rows meet in an addition.
        for tokens, parts in zip(
            self._tokens_N.split(self._sent), parts_ND.split(self._sent), strict=True
        ):
            out_TD.index_add_(0, tokens, parts.float())
        return out_TD.to(self._dtype)

    def _all_to_all(
        self, out: torch.Tensor, rows: torch.Tensor, out_rows: list[int], in_rows: list[int]
    ) -> "dist.Work":
        work = dist.all_to_all_single(
            out, rows, out_rows, in_rows, group=self._group.process_group, async_op=True
        )
        assert work is not None
        return work


def _destinations(
    slots_TK: torch.Tensor, slots_of_ranks: tuple[tuple[int, int], ...], moe_tp: int
) -> torch.Tensor:
    """Return bool [R, T]: whether a rank holds some expert of a token."""
    goes_ET = torch.stack(
        [((slots_TK >= first) & (slots_TK < stop)).any(1) for first, stop in slots_of_ranks]
    )
    return goes_ET.repeat_interleave(moe_tp, dim=0)


def _packed(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, slots_TK: torch.Tensor, tokens_N: torch.Tensor
) -> torch.Tensor:
    """Return uint8 [N, B]: of each row its slots, its weights and the token."""
    head, start, columns = _row(slots_TK.shape[1], x_TD.shape[1], x_TD.dtype)
    size = _aligned(start + columns)
    packed_NB = torch.empty(len(tokens_N), size, dtype=torch.uint8, device=x_TD.device)
    packed_NB[:, :head].view(torch.int32).copy_(slots_TK[tokens_N])
    packed_NB[:, head : 2 * head].view(torch.float32).copy_(weights_TK[tokens_N])
    packed_NB[:, start : start + columns].view(x_TD.dtype).copy_(x_TD[tokens_N])
    return packed_NB


def _row(top_k: int, dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the bytes of the slots, where the token begins, and its bytes."""
    head = 4 * top_k
    return head, _aligned(2 * head), dim * dtype.itemsize


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
