"""Sums over shared memory by ranks that run at once and wait for each other, without a GPU."""

from pathlib import Path

import pytest
import torch
from tests.conftest import HAS_GPU
from tests.executor.ranks import Ranks

from rankwright.executor.peer_memory import trial_part


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


@pytest.mark.skipif(HAS_GPU, reason="interprets; with GPUs see test_peer_memory.py")
@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_written_to_peers_are_summed_once_all_have_come(
    pool: Ranks, tmp_path: Path, world_size: int
) -> None:
    arguments = tmp_path, world_size, 7, 20
    found = pool.run(world_size, "tests.executor.peer_interpreted", "pushed_chain", *arguments)
    for results, residual, plain in found:
        assert torch.equal(residual, plain)
        for out, expected in results:
            torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)
        for (out, _), (other, _) in zip(results, found[0][0], strict=True):
            assert torch.equal(out, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_the_trial_and_their_sums_are_exact_and_new_in_each_repeat(
    dtype: torch.dtype,
) -> None:
    repeats = [
        torch.stack([trial_part(rank, repeat, 8, 120) for rank in range(8)]) for repeat in range(6)
    ]
    for repeat, parts in enumerate(repeats):
        assert torch.equal(parts.to(dtype).long(), parts)
        assert torch.equal(parts.sum(0).to(dtype).long(), parts.sum(0))
        for older in repeats[:repeat]:  # what is left in a place gives another sum
            assert all(not torch.equal(mine, old) for mine, old in zip(parts, older, strict=True))
            assert not torch.equal(parts.sum(0), older.sum(0))
