"""What the ranks of a test of groups run: each collective on numbers that tell whose they are."""

import torch
import torch.distributed as dist

from rankwright.executor.groups import make_group


def collectives(
    rank: int, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather, sum and shared-out sum over all ranks, of [rows, 8] that hold the rank plus the row.

    The parts lie apart in memory, as columns of a larger tensor do.
    """
    size = dist.get_world_size()
    group = make_group(tuple(range(size)))

    def part(num_rows: int) -> torch.Tensor:
        numbers = rank + (torch.arange(num_rows) % 100).to(dtype)  # exact also in bfloat16
        return numbers.unsqueeze(1).repeat(1, 16)[:, :8]

    gathered = group.gathered(part(rows))
    summed = group.summed(part(rows).contiguous())
    return gathered, summed, group.summed_share(part(rows * size))
