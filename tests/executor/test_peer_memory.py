"""Sums over memory that GPUs share, between real GPUs; the kernel alone: tests/kernels."""

import pytest
import torch
from tests.executor.ranks import Ranks

from rankwright.cost_model.peer_sums import SumAlgorithm

pytestmark = pytest.mark.gpu
CASES = "tests.executor.peer_cases"


def need(num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs, {torch.cuda.device_count()} here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "dim"), [(1, 4096), (3, 120), (64, 4096), (700, 1000)])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("algorithm", ["pushed", "one_shot", "two_shot"])
def test_sums_equal_those_of_nccl_whoever_lags(
    pool: Ranks,
    world_size: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    algorithm: SumAlgorithm,
) -> None:
    need(world_size)
    if world_size > 2 and rows > 64 and algorithm == "one_shot":
        pytest.skip("larger than four ranks sum in one shot")
    arguments = rows, dim, dtype, 20, algorithm
    for errors in pool.run(world_size, CASES, "sums", *arguments, backend="nccl"):
        # A sum of n bfloat16 numbers that is rounded once.
        assert max(errors) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("num_sums", [2, 5, 64])
@pytest.mark.parametrize("rows", [1, 8, 600])
@pytest.mark.parametrize(
    ("world_size", "algorithm"),
    [(2, "pushed"), (4, "pushed"), (2, "one_shot"), (2, "two_shot"), (4, "two_shot")],
)
def test_a_graph_of_sums_and_norms_repeats(
    pool: Ranks, rows: int, num_sums: int, world_size: int, algorithm: SumAlgorithm
) -> None:
    need(world_size)
    arguments = rows, 2048, num_sums, 12, algorithm
    for worst, equal in pool.run(world_size, CASES, "graph", *arguments, backend="nccl"):
        assert equal
        assert worst <= 4 * torch.finfo(torch.bfloat16).eps
