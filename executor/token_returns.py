"""How sampled tokens get from the last stage of a pipeline to the first.

Every rank of the first stage gets those of each step, because each of them computes the next tokens
of the same sequences. Who needs a step's tokens waits for them then, and not before, so that all
else about the next step is done when they come.
"""

from collections import deque
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from rankwright.executor.drawn import Drawn
from rankwright.executor.mesh import Mesh
from rankwright.executor.stage_memory import StageMemory
from rankwright.executor.step_batch import Int64, known_tokens


class TokenReturns(Protocol):
    """What one rank sends or expects; steps come in turn."""

    def send(self, drawn: Drawn, *, leave: int) -> None:
        """Send what the next step draws, on the rank that samples.

        Where that waits on the host, the tokens of the last `leave` steps are left for later.
        """
        ...

    def send_ready(self) -> bool:
        """Send what is ready of what was left; return whether something is left still."""
        ...

    def expect(self, step: int, count: int) -> None:
        """Prepare for the `count` tokens of step `step`, on the first stage."""
        ...

    def known(self, ids_T: Int64, step: int) -> Int64:
        """Return `ids_T`, with the tokens of an expected step for its rows if the host has them."""
        ...

    def leave(self, step: int, drawn_R: torch.Tensor) -> None:
        """Leave the tokens of an expected step in `drawn_R`, for what is launched next, if not."""
        ...

    def tokens(self, step: int) -> list[int]:
        """Return the tokens of a step that is expected, once they are there."""
        ...

    def finish(self) -> None:
        """Wait until all that was sent or is expected is there."""
        ...


def token_returns(mesh: Mesh, memory: StageMemory | None) -> TokenReturns:
    """Return the way of this rank's tokens: through memory that stages share, else by messages."""
    return MessageReturns(mesh) if memory is None else MemoryReturns(mesh, memory)


class MessageReturns:
    """From host to host, over gloo.

    Args:
        mesh: The rank's groups; of a pipeline.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._keep = 2 * mesh.num_stages  # steps whose tokens may still be asked for, and more
        self._unsent: deque[Drawn] = deque()
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._expected: dict[int, tuple[dist.Work | None, torch.Tensor]] = {}

    def send(self, drawn: Drawn, *, leave: int) -> None:
        """Start sending the tokens of all steps but the last `leave`, once they are there."""
        self._unsent.append(drawn)
        while len(self._unsent) > leave:
            self._send(self._unsent.popleft().wait())

    def send_ready(self) -> bool:
        """Send what is ready."""
        while self._unsent and self._unsent[0].is_ready():
            self._send(self._unsent.popleft().wait())
        return bool(self._unsent)

    def _send(self, token_ids: list[int]) -> None:
        # One more, because there are steps that draw nothing.
        buffer = torch.tensor([*token_ids, 0], dtype=torch.int64)
        for rank in self._mesh.first_stage_ranks:
            work = dist.isend(buffer, rank, group=self._mesh.results.process_group)
            assert work is not None
            self._sending.append((work, buffer))
        while len(self._sending) > self._keep * len(self._mesh.first_stage_ranks):
            self._sending.popleft()[0].wait()

    def expect(self, step: int, count: int) -> None:
        """Prepare for the `count` tokens of step `step`; steps come in turn."""
        buffer = torch.zeros(count + 1, dtype=torch.int64)
        work = dist.irecv(buffer, self._mesh.sampler_rank, group=self._mesh.results.process_group)
        assert work is not None
        self._expected[step] = work, buffer
        if len(self._expected) > self._keep:
            oldest = next(iter(self._expected))
            self.tokens(oldest)  # long there: the leader has taken them in
            del self._expected[oldest]

    def known(self, ids_T: Int64, step: int) -> Int64:
        """Return `ids_T` with the tokens of an expected step where it names its rows."""
        return known_tokens(ids_T, np.array(self.tokens(step), dtype=np.int64))

    def leave(self, step: int, drawn_R: torch.Tensor) -> None:
        """Nothing: `known` had them."""

    def tokens(self, step: int) -> list[int]:
        """Return the tokens of a step that is expected, once they are there."""
        work, buffer = self._expected[step]
        if work is not None:
            work.wait()
            self._expected[step] = None, buffer  # gloo would wait for another message
        found: list[int] = buffer[:-1].tolist()
        return found

    def finish(self) -> None:
        """Wait until all that was sent or is expected is there."""
        while self._unsent:
            self._send(self._unsent.popleft().wait())
        for step in tuple(self._expected):
            self.tokens(step)
        self._expected.clear()
        while self._sending:
            self._sending.popleft()[0].wait()


class MemoryReturns:
    """From device to device, through memory that stages share; hosts read them later.

    Args:
        mesh: The rank's groups; of a pipeline.
        memory: What the tokens go through.
    """

    def __init__(self, mesh: Mesh, memory: StageMemory) -> None:
        self._reads = mesh.is_leader
        self._keep = mesh.num_stages + 2
        self._memory = memory
        self._expected: dict[int, tuple[int, int]] = {}
        self._drawn: dict[int, Drawn] = {}

    def send(self, drawn: Drawn, *, leave: int) -> None:
        """Send the tokens behind what draws them, without waiting."""
        self._memory.send_tokens(drawn.tokens_R)

    def send_ready(self) -> bool:
        """Nothing is ever left."""
        return False

    def expect(self, step: int, count: int) -> None:
        """Note which tokens are of step `step`."""
        self._expected[step] = self._memory.expect_tokens(), count
        if len(self._expected) > self._keep:
            oldest = next(iter(self._expected))
            del self._expected[oldest]
            self._drawn.pop(oldest, None)

    def known(self, ids_T: Int64, step: int) -> Int64:
        """Return `ids_T`: no host waits for the tokens."""
        return ids_T

    def leave(self, step: int, drawn_R: torch.Tensor) -> None:
        """Leave the tokens in `drawn_R`, once they are there."""
        tokens_R = self._receive(step)
        drawn_R[: len(tokens_R)].copy_(tokens_R, non_blocking=True)

    def tokens(self, step: int) -> list[int]:
        """Return the tokens of a step that is expected, once they are there."""
        if step not in self._drawn:
            self._receive(step)
        return self._drawn[step].wait()

    def _receive(self, step: int) -> torch.Tensor:
        tokens_R = self._memory.receive_tokens(*self._expected[step])
        if self._reads and step not in self._drawn:
            self._drawn[step] = Drawn(tokens_R)
        return tokens_R

    def finish(self) -> None:
        """Nothing: the leader has had the tokens of every step."""
