"""`StageLink`: how hidden states get from one pipeline stage to the next.

Through memory that the ranks of one machine share (`stage_memory.py`), else as messages of the
process group of each pair of ranks (here): NCCL between GPUs, gloo between CPUs.
"""

from typing import Protocol

import torch
import torch.distributed as dist

from rankwright.executor.mesh import Mesh


class StageLink(Protocol):
    """Sends to the same rank of the next stage, and receives from that of the stage before."""

    def send(self, hidden_TD: torch.Tensor) -> None:
        """Start sending; the tensor may be dropped, but not be written again."""
        ...

    def receive(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return `hidden_TD`, filled with what was sent next."""
        ...

    def finish(self) -> None:
        """Wait until the next stage can do without this rank."""
        ...


class GroupLink:
    """A link by messages.

    Args:
        mesh: This rank's groups.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sending: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, hidden_TD: torch.Tensor) -> None:
        """Start sending; hold the tensor until the send is over."""
        self._sending = [
            (work, tensor) for work, tensor in self._sending if not work.is_completed()
        ]
        work = self._mesh.send_to_next(hidden_TD)
        if work is not None:
            self._sending.append((work, hidden_TD))

    def receive(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Fill `hidden_TD`, in the order of the current stream."""
        return self._mesh.receive_from_previous(hidden_TD)

    def finish(self) -> None:
        """Wait until the next stage has everything that was sent."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
