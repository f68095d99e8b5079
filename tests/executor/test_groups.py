"""Collectives of small tensors, in one round on CPUs, and of large ones give the same."""

import pytest
import torch
from tests.executor.ranks import Ranks

from rankwright.executor.groups import ONE_ROUND_BYTES

LARGE = ONE_ROUND_BYTES // 8 // 2 + 1  # rows of 8 numbers of 2 bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [1, 5, LARGE])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_gather_and_add_up(pool: Ranks, size: int, rows: int, dtype: torch.dtype) -> None:
    results = pool.run(size, "tests.executor.group_cases", "collectives", rows, dtype)
    numbers = (torch.arange(rows * size) % 100).to(dtype).unsqueeze(1).repeat(1, 8)
    total = torch.stack([numbers + rank for rank in range(size)]).sum(0)
    for rank, (gathered, summed, share) in enumerate(results):
        assert torch.equal(gathered, torch.stack([numbers[:rows] + r for r in range(size)]))
        assert torch.equal(summed, total[:rows])
        assert torch.equal(share, total[rank * rows : (rank + 1) * rows])
