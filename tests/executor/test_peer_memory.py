"""Sums over memory that GPUs share, between real GPUs; the kernel alone: tests/kernels."""

import pytest
import torch
from tests.executor.ranks import Ranks

pytestmark = pytest.mark.gpu
CASES = "tests.executor.peer_cases"


def need(num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs, {torch.cuda.device_count()} here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "dim"), [(1, 4096), (3, 120), (64, 4096), (700, 1000)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_equal_those_of_nccl_whoever_lags(
    pool: Ranks, world_size: int, rows: int, dim: int, dtype: torch.dtype
) -> None:
    need(world_size)
    if world_size > 2 and rows > 64:
        pytest.skip("larger than four ranks sum in one shot")
    for errors in pool.run(world_size, CASES, "sums", rows, dim, dtype, 20, backend="nccl"):
        # A sum of n bfloat16 numbers that is rounded once.
        assert max(errors) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("num_sums", [2, 5, 64])
@pytest.mark.parametrize("rows", [1, 8, 600])
def test_a_graph_of_sums_and_norms_repeats(pool: Ranks, rows: int, num_sums: int) -> None:
    need(2)
    for worst, equal in pool.run(2, CASES, "graph", rows, 2048, num_sums, 12, backend="nccl"):
        assert equal
        assert worst <= 4 * torch.finfo(torch.bfloat16).eps
