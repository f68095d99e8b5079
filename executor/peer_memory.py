"""`PeerMemory`: GPU memory that the ranks of a TP group share, and sums over it.

Each rank computes its part of a sum right into its shared memory; one kernel then waits for the
peers, reads all parts and adds them up (`kernels/all_reduce.py`), or sums its share of the rows for
all (`kernels/two_shot_sum.py`), or writes its part to all peers (`kernels/pushed_sum.py`): the
table that the cost model prices by says which, by size (`cost_model/peer_sums.py`). Inside CUDA
graphs too: addresses are fixed, and what ranks count is in memory.

A part may be written again only when no peer still reads it. A rank that has come to the next sum
has done with the last, so parts alternate between two places, and one may be written as soon as the
sum after it is done. A step that ended on one place must not begin there: the first sum of a step
has a place of its own (`begin`).
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from rankwright.cost_model.peer_sums import PeerSums, SumAlgorithm, peer_sums
from rankwright.kernels.all_reduce import MAX_PROGRAMS, Peers, sum_parts
from rankwright.kernels.pushed_sum import MAX_ROWS, arrivals_words, sum_pushed_parts
from rankwright.kernels.two_shot_sum import sum_parts_in_two_shots

# NVLink multicast stays off: not every container's driver lets go of it cleanly.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
_NUM_PLACES = 3  # the first of a step, and two that alternate
# Of the sums that are tried at start, once launched: they take microseconds where peers answer, and
# ranks come to them apart by what they take to compile the kernel.
_TRIAL_S = 120.0
_POLL_S = 0.01
# With RANKWRIGHT_PUSHED_SUMS=1, parts of up to so many bytes are written to peers.
_PUSHED_BYTES = 64 << 10


class PeerMemory:
    """Parts of up to `max_rows` rows of `dim` values, shared over one group.

    Args:
        group: Ranks on one machine that reach each other's memory.
        max_rows: Rows of a part at most.
        dim: Values of a row.
        dtype: Of the values.
        device: This rank's GPU.
        table: Which form is taken, by size.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        max_rows: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        table: PeerSums,
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._rank, self._world_size = group.rank(), group.size()
        self._table = table
        place_bytes = -(-max_rows * dim * dtype.itemsize // 16) * 16
        # What others summed arrives behind the places of parts.
        num_places = _NUM_PLACES + (1 if table.two_shot_bytes else 0)
        self._pushed_rows = _pushed_rows(table, max_rows, dim, dtype)
        arrivals_bytes = 8 * arrivals_words(self._pushed_rows, dim, self._world_size)
        num_words = MAX_PROGRAMS * self._world_size
        room_bytes = num_places * place_bytes
        memory = symmetric_memory.empty(
            room_bytes + arrivals_bytes + num_words * 4, dtype=torch.uint8, device=device
        )
        self._handle = symmetric_memory.rendezvous(memory, group)
        memory.zero_()
        self._memory = memory
        self._place_values = place_bytes // dtype.itemsize
        parts = memory[: _NUM_PLACES * place_bytes].view(dtype).view(_NUM_PLACES, -1)
        self._places = [part[: max_rows * dim].view(max_rows, dim) for part in parts]
        self._arrivals_word = room_bytes // 8
        self._arrivals = memory[room_bytes : room_bytes + arrivals_bytes].view(torch.int64)
        self._peers = Peers(
            table_address=self._handle.buffer_ptrs_dev,
            words=memory[room_bytes + arrivals_bytes :].view(torch.int32),
            epochs=torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
            signal_word=(room_bytes + arrivals_bytes) // 4,
            rank=self._rank,
            world_size=self._world_size,
        )
        self._pushed_epochs = torch.zeros(self._pushed_rows, dtype=torch.int32, device=device)
        self._place = 0
        torch.cuda.synchronize(device)

    @property
    def max_rows(self) -> int:
        """Rows of a part at most."""
        return len(self._places[0])

    @property
    def algorithms(self) -> tuple[SumAlgorithm, ...]:
        """The forms that the table takes for some size."""
        there: dict[SumAlgorithm, int] = {
            "pushed": self._pushed_rows,
            "one_shot": 1,
            "two_shot": self._table.two_shot_bytes,
        }
        return tuple(algorithm for algorithm, room in there.items() if room)

    def begin(self) -> None:
        """Start a step: its first sum has a place of its own."""
        self._place = 0

    def part(self, num_rows: int, dim: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return where the next sum's part is best written, [rows, dim]; None: it does not fit."""
        place = self._places[self._place]
        if num_rows > len(place) or dim != place.shape[1] or dtype != place.dtype:
            return None
        return place[:num_rows]

    def sum(
        self,
        x_TD: torch.Tensor,
        *,
        weight_D: torch.Tensor | None = None,
        eps: float = 0.0,
        residual_TD: torch.Tensor | None = None,
        algorithm: SumAlgorithm | None = None,
    ) -> torch.Tensor | None:
        """Return the sum of all ranks' `x_TD`, or its norm; None: NCCL has to do it.

        Args:
            x_TD: This rank's part; copied, unless it is what `part` returned.
            weight_D: With a residual: return the RMSNorm of residual plus sum instead.
            eps: Of the norm.
            residual_TD: Becomes `residual_TD + sum` in place.
            algorithm: Instead of what the table says; equal on all ranks.
        """
        part = self.part(len(x_TD), x_TD.shape[1], x_TD.dtype)
        algorithm = algorithm or self._table.algorithm(x_TD.numel() * x_TD.element_size())
        if part is None or algorithm == "library":
            return None
        norm: dict[str, Any] = {"weight_D": weight_D, "eps": eps, "residual_TD": residual_TD}
        out_TD = torch.empty_like(part)
        place, self._place = self._place, 1 if self._place != 1 else 2
        if algorithm == "pushed" and len(part) <= self._pushed_rows:
            return sum_pushed_parts(
                x_TD,
                out_TD,
                arrivals=self._arrivals,
                epochs=self._pushed_epochs,
                word_offset=self._arrivals_word,
                max_rows=self._pushed_rows,
                table_address=self._peers.table_address,
                rank=self._rank,
                world_size=self._world_size,
                **norm,
            )
        if part.data_ptr() != x_TD.data_ptr():
            part.copy_(x_TD)
        part_offset = place * self._place_values
        if algorithm == "two_shot":
            arrivals_offset = _NUM_PLACES * self._place_values
            return sum_parts_in_two_shots(out_TD, self._peers, part_offset, arrivals_offset, **norm)
        return sum_parts(out_TD, self._peers, part_offset, **norm)


def _pushed_rows(table: PeerSums, max_rows: int, dim: int, dtype: torch.dtype) -> int:
    """Return how many rows there is to be room for that peers write here."""
    if dtype.itemsize != 2 or dim % 2:
        return 0  # a word of 4 bytes goes with its number: two values, or none
    return min(max_rows, MAX_ROWS, table.pushed_bytes // (dim * dtype.itemsize))


def open_peer_memory(
    group: dist.ProcessGroup | None,
    *,
    one_machine: bool,
    max_rows: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    table: PeerSums | None = None,
) -> PeerMemory | None:
    """Return the group's shared memory, checked by a sum; None where NCCL has to do.

    All ranks of the group must call this together. A refusal of peer access is one warning line. A
    peer that shares memory and then never answers is an error: a kernel that waits for it cannot be
    taken back, only ended with its process.

    Args:
        group: The TP group; None: a single rank.
        one_machine: Whether all of it is on one.
        max_rows: Rows of one sum at most.
        dim: Values of a row.
        dtype: Of the values.
        device: This rank's GPU.
        table: Which form is taken, by size; None: the one for so many ranks.

    Raises:
        TimeoutError: A peer did not answer.
    """
    if group is None or device.type != "cuda" or not one_machine:
        return None
    if table is None:
        table = peer_sums(group.size())
        if os.environ.get("RANKWRIGHT_PUSHED_SUMS", "0") == "1":
            table = replace(table, pushed_bytes=_PUSHED_BYTES)
    rows = min(max_rows, table.max_bytes // (dim * dtype.itemsize))
    if rows < 1 or os.environ.get("RANKWRIGHT_PEER_MEMORY", "1") == "0":
        return None
    opened: PeerMemory | None = None
    reason = "another rank could not open it"
    try:
        opened = PeerMemory(group, max_rows=rows, dim=dim, dtype=dtype, device=device, table=table)
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
    # A sum before everyone has opened would wait for ever.
    if not _all(opened is not None, group, device):
        opened = None
    if opened is not None and not _all(
        _sums_right(opened, dim, dtype, group, device), group, device
    ):
        opened, reason = None, "the sums that were tried came out wrong"
    if opened is None and group.rank() == 0:
        warnings.warn(
            f"GPUs do not share memory, so sums over {group.size()} of them go through NCCL, which "
            f"is slower for small batches: {reason}",
            stacklevel=2,
        )
    return opened


def _sums_right(
    memory: PeerMemory, dim: int, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device
) -> bool:
    """Whether sums of known numbers are right: some machines copy between GPUs wrongly."""
    ranks = group.size()
    rows = min(ranks, memory.max_rows)  # in two shots each rank sums one
    outs: list[tuple[torch.Tensor, torch.Tensor]] = []
    memory.begin()
    for repeat, algorithm in enumerate(memory.algorithms * 3):
        parts = [trial_part(rank, repeat, rows, dim).to(device) for rank in range(ranks)]
        out_TD = memory.sum(parts[group.rank()].to(dtype), algorithm=algorithm)
        assert out_TD is not None
        outs.append((out_TD, torch.stack(parts).sum(0).to(dtype)))
    # Comparing would wait on the host for the kernels, however long that takes.
    launched = torch.cuda.Event()
    launched.record()
    wait_until(launched.query, within_s=_TRIAL_S)
    return all(torch.equal(out_TD, expected_TD) for out_TD, expected_TD in outs)


def trial_part(rank: int, repeat: int, num_rows: int, dim: int) -> torch.Tensor:
    """Return whole numbers [rows, dim] that a rank puts into a trial, others in each repeat.

    At most 16, so that sums over up to 16 ranks are exact in bfloat16, whose whole numbers end at
    256.
    """
    column_D = torch.arange(dim)
    row_T1 = torch.arange(num_rows)[:, None]
    return (column_D + 5 * row_T1 + 3 * rank + 7 * repeat) % 17


def wait_until(
    is_done: Callable[[], bool],
    *,
    within_s: float,
    who: str = "a GPU of the tensor-parallel group",
    remedy: str = "set RANKWRIGHT_PEER_MEMORY=0 to sum through NCCL instead",
) -> None:
    """Return when the trial `is_done`.

    Args:
        is_done: Looked at now and then.
        within_s: How long.
        who: Did not answer.
        remedy: What the user may do.

    Raises:
        TimeoutError: It is not within `within_s` seconds.
    """
    deadline_s = time.monotonic() + within_s
    while not is_done():
        if time.monotonic() > deadline_s:
            raise TimeoutError(
                f"{who} did not answer through shared memory within {within_s:g} s; {remedy}, and "
                "see the logs of the other ranks"
            )
        time.sleep(_POLL_S)


def _all(mine: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    flag = torch.tensor([int(mine)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())
