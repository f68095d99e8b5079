"""Process groups of some ranks of the world."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks of the world that talk to each other; `process_group` is None for one rank."""

    ranks: tuple[int, ...]
    process_group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Return the equally large parts of all ranks, [ranks, ...]."""
        out = part.new_empty(self.size, *part.shape)
        dist.all_gather_into_tensor(
            out.view(-1, *part.shape[1:]), part.contiguous(), group=self.process_group
        )
        return out


def make_group(
    ranks: tuple[int, ...], *, backend: str | None = None, timeout: timedelta | None = None
) -> Group:
    """Return the group of `ranks`; every rank of the world must call this, in the same order.

    Args:
        ranks: Who is in it.
        backend: None: NCCL on GPUs, gloo on CPUs.
        timeout: How long a collective waits for a rank; None: as the default group.
    """
    if len(ranks) == 1:
        return Group(ranks, None)
    made = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    # Who is not in it gets a placeholder.
    return Group(ranks, made if isinstance(made, dist.ProcessGroup) else None)
