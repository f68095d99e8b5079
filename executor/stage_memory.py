"""`StageMemory`: stages of a pipeline on one machine hand over through memory that they share.

A rank writes the hidden states of a step into its peer's memory on a stream of its own while it
computes the next step; they lie there when the peer comes to them, and no kernel of a transport
takes multiprocessors from either. The rank that samples writes the tokens of each step to every
rank of the first stage, so that the step which goes on from them can be launched before any host
knows them. What is written over has been used: hidden states have two places in turn, and a sender
waits, on its own stream, for the place to be free; tokens have one for each step that can be on its
way.
Shape letters: T tokens, D hidden, R rows that a step samples.
"""

import os
import warnings
from dataclasses import dataclass

import torch

from rankwright.executor.mesh import Mesh
from rankwright.executor.near_memory import WORD_BYTES, GpuMemory, HostMemory, NearMemory
from rankwright.executor.peer_memory import wait_until
from rankwright.executor.shared_channel import is_supported

VARIABLE = "RANKWRIGHT_PIPELINE_AHEAD"
# Places for hidden states: one is computed from while the next fills.
NUM_PLACES = 2
_HIDDEN_THERE, _HIDDEN_USED, _TOKENS_THERE = range(3)
_ALIGN_BYTES = 256
# Of the trial at start, once launched: longer than ranks are apart by compiling.
_TRIAL_S = 120.0


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A rank, and those that it hands to or gets from, by their places in the replica."""

    here: int
    previous: int | None
    next: int | None
    first_stage: tuple[int, ...]
    sampler: int


class StageMemory:
    """One rank's end; `send`, `receive` and `finish` make it a `StageLink`.

    Args:
        memory: With room for `num_bytes`.
        neighbours: Whom this rank talks to.
        rows: T at most.
        dim: D.
        dtype: Of hidden states.
        max_num_seqs: R at most.
        token_places: Steps that can be on their way at once, and one more.
    """

    def __init__(
        self,
        memory: NearMemory,
        neighbours: Neighbours,
        *,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        max_num_seqs: int,
        token_places: int,
    ) -> None:
        self._memory = memory
        self._to = neighbours
        self._rows, self._dim, self._dtype = rows, dim, dtype
        self._token_places = token_places
        self._place_bytes = _aligned(rows * dim * dtype.itemsize)
        self._tokens_bytes = _aligned(max_num_seqs * 8)
        self._sent = self._received = self._tokens_sent = self._tokens_expected = 0

    @staticmethod
    def num_bytes(
        *, rows: int, dim: int, dtype: torch.dtype, max_num_seqs: int, token_places: int
    ) -> int:
        """Return what each rank's part takes."""
        return (
            WORD_BYTES
            + NUM_PLACES * _aligned(rows * dim * dtype.itemsize)
            + token_places * _aligned(max_num_seqs * 8)
        )

    def send(self, hidden_TD: torch.Tensor) -> None:
        """Start writing to the next stage; the tensor may be dropped, but not be written again."""
        peer = self._to.next
        assert peer is not None
        with self._memory.aside(hidden_TD):
            if self._sent >= NUM_PLACES:
                used = self._sent - NUM_PLACES + 1
                self._memory.wait(_HIDDEN_USED, used, writer=peer)
            self._hidden(peer, self._sent, len(hidden_TD)).copy_(hidden_TD, non_blocking=True)
            self._sent += 1
            self._memory.tell(peer, _HIDDEN_THERE, self._sent)

    def receive(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return `hidden_TD`, filled with what the stage before wrote next."""
        peer, here = self._to.previous, self._to.here
        assert peer is not None
        self._memory.wait(_HIDDEN_THERE, self._received + 1, writer=peer)
        hidden_TD.copy_(self._hidden(here, self._received, len(hidden_TD)), non_blocking=True)
        self._received += 1
        self._memory.tell(peer, _HIDDEN_USED, self._received)
        return hidden_TD

    def finish(self) -> None:
        """Nothing: this memory is there until all ranks have ended."""

    def send_tokens(self, tokens_R: torch.Tensor) -> None:
        """Write the tokens of the next step to every rank of the first stage; int64."""
        for peer in self._to.first_stage:
            self._tokens(peer, self._tokens_sent, len(tokens_R)).copy_(tokens_R, non_blocking=True)
            self._memory.tell(peer, _TOKENS_THERE, self._tokens_sent + 1)
        self._tokens_sent += 1

    def expect_tokens(self) -> int:
        """Return the number by which the tokens of the next step are received."""
        self._tokens_expected += 1
        return self._tokens_expected - 1

    def receive_tokens(self, number: int, count: int) -> torch.Tensor:
        """Return the `count` tokens of a step once they are there; overwritten some steps later."""
        self._memory.wait(_TOKENS_THERE, number + 1, writer=self._to.sampler)
        return self._tokens(self._to.here, number, count)

    def works(self) -> bool:
        """Whether known numbers get from stage to stage, and back as tokens; waits for them.

        Raises:
            TimeoutError: A rank did not answer.
        """
        to = self._to
        equal: list[tuple[torch.Tensor, torch.Tensor]] = []
        device = self._memory.part(to.here, 0, (1,), torch.int64).device
        numbers = torch.arange(self._dim + 2 * NUM_PLACES, device=device) % 61
        for repeat in range(2 * NUM_PLACES):
            row_D = numbers[repeat : repeat + self._dim].to(self._dtype)
            tokens_R = numbers[repeat : repeat + 1]
            if to.previous is not None:
                found_TD = self.receive(torch.empty_like(row_D)[None])
                equal.append((found_TD[0], row_D))
            if to.next is not None:
                self.send(row_D[None])
            if to.here == to.sampler:
                self.send_tokens(tokens_R)
            if to.here in to.first_stage:
                number = self.expect_tokens()
                equal.append((self.receive_tokens(number, len(tokens_R)).clone(), tokens_R))
        if device.type == "cuda":
            # Comparing would wait on the host for the kernels, however long that takes.
            launched = torch.cuda.Event()
            launched.record()
            wait_until(
                launched.query,
                within_s=_TRIAL_S,
                who="a stage of the pipeline",
                remedy=f"set {VARIABLE}=0 to send messages instead",
            )
        return all(torch.equal(a, b) for a, b in equal)

    def _hidden(self, rank: int, number: int, rows: int) -> torch.Tensor:
        if rows > self._rows:
            raise ValueError(f"{rows} rows of hidden states; there is room for {self._rows}")
        offset = WORD_BYTES + number % NUM_PLACES * self._place_bytes
        return self._memory.part(rank, offset, (rows, self._dim), self._dtype)

    def _tokens(self, rank: int, number: int, count: int) -> torch.Tensor:
        offset = WORD_BYTES + NUM_PLACES * self._place_bytes
        offset += number % self._token_places * self._tokens_bytes
        return self._memory.part(rank, offset, (count,), torch.int64)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def neighbours(mesh: Mesh) -> Neighbours:
    """Return whom this rank of a pipeline talks to."""
    size = mesh.split.tp * mesh.split.cp
    here = mesh.control.ranks.index(mesh.place.rank)
    return Neighbours(
        here=here,
        previous=None if mesh.is_first_stage else here - size,
        next=None if mesh.is_last_stage else here + size,
        first_stage=tuple(range(size)),
        sampler=mesh.control.ranks.index(mesh.sampler_rank),
    )


def is_wanted(mesh: Mesh) -> bool:
    """Whether this rank's replica is a pipeline that hands over through memory.

    On one machine, unless `RANKWRIGHT_PIPELINE_AHEAD` is 0.
    """
    if mesh.num_stages == 1 or not mesh.is_one_machine or os.environ.get(VARIABLE) == "0":
        return False
    return mesh.device.type == "cuda" or is_supported()


def open_stage_memory(
    mesh: Mesh, *, rows: int, dim: int, dtype: torch.dtype, max_num_seqs: int
) -> StageMemory | None:
    """Return memory that the stages of this rank's replica share, tried; None: messages have to do.

    All ranks of the replica must call this together. A refusal is one warning line.

    Args:
        mesh: This rank's groups.
        rows: Tokens of a step on one rank at most.
        dim: Hidden size.
        dtype: Of hidden states.
        max_num_seqs: Tokens that a step draws at most.

    Raises:
        TimeoutError: A rank did not answer.
    """
    if not all(mesh.gather_integers(int(is_wanted(mesh)))):
        return None
    # Steps on their way: one a stage, and one ahead.
    places = mesh.num_stages + 2
    num_bytes = StageMemory.num_bytes(
        rows=rows, dim=dim, dtype=dtype, max_num_seqs=max_num_seqs, token_places=places
    )
    memory: NearMemory | None = None
    reason = "another rank could not open it"
    try:
        if mesh.device.type == "cuda":
            memory = GpuMemory(mesh.control, num_bytes, mesh.device)
        else:
            memory = HostMemory(mesh.control, mesh.place.rank, num_bytes)
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
    # A word to one that has not opened it would be lost.
    opened: StageMemory | None = None
    if all(mesh.gather_integers(int(memory is not None))):
        assert memory is not None
        opened = StageMemory(
            memory,
            neighbours(mesh),
            rows=rows,
            dim=dim,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            token_places=places,
        )
        if not all(mesh.gather_integers(int(opened.works()))):
            opened, reason = None, "what was tried came out wrong"
    if opened is None and mesh.is_leader:
        warnings.warn(
            "the stages of the pipeline do not share memory, so they send messages, and wait for "
            f"their hosts between steps: {reason}",
            stacklevel=2,
        )
    return opened
