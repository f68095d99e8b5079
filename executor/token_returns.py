"""`TokenReturns`: sampled tokens on their way from the last stage of a pipeline to the first.

Over gloo, from host to host: every rank of the first stage gets those of each step, because each of
them computes the next tokens of the same sequences. Who needs a step's tokens waits for them then,
and not before, so that all else about the next step is done when they come.
"""

from collections import deque

import torch
import torch.distributed as dist

from rankwright.executor.mesh import Mesh


class TokenReturns:
    """What one rank sends or expects.

    Args:
        mesh: Its groups; of a pipeline.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._keep = 2 * mesh.num_stages  # steps whose tokens may still be asked for, and more
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._expected: dict[int, tuple[dist.Work | None, torch.Tensor]] = {}

    def send(self, token_ids: list[int]) -> None:
        """Start sending the tokens of the next step, in the order of its rows."""
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
        for step in tuple(self._expected):
            self.tokens(step)
        self._expected.clear()
        while self._sending:
            self._sending.popleft()[0].wait()
