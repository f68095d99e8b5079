"""Sums over shared memory by ranks that run at once and wait for each other, without a GPU."""

from pathlib import Path

import pytest
import torch
from tests.conftest import HAS_GPU
from tests.executor.ranks import Ranks


@pytest.mark.skipif(HAS_GPU, reason="interprets; with GPUs see test_peer_memory.py")
@pytest.mark.parametrize(("world_size", "forms"), [(2, "22122"), (3, "212")])
def test_a_chain_of_both_forms_sums_what_all_ranks_have(
    pool: Ranks, tmp_path: Path, world_size: int, forms: str
) -> None:
    results = pool.run(
        world_size, "tests.executor.peer_interpreted", "chain", tmp_path, world_size, forms, 5, 24
    )
    for out, residual, expected, expected_residual in results:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(residual, expected_residual, rtol=1e-4, atol=1e-5)
        assert torch.equal(out, results[0][0])
