"""Tokens through memory that GPUs share, between real GPUs; the kernels alone: tests/kernels."""

import pytest
import torch
from tests.executor.ranks import Ranks

pytestmark = pytest.mark.gpu
CASES = "tests.executor.peer_cases"


def need(num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs, {torch.cuda.device_count()} here")


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 256])
@pytest.mark.parametrize(("world_size", "moe_tp"), [(2, 1), (4, 1), (4, 2)])
def test_tokens_come_back_as_their_experts_made_them_whoever_lags(
    pool: Ranks, world_size: int, moe_tp: int, num_tokens: int, in_graph: bool
) -> None:
    need(world_size)
    results = pool.run(
        world_size, CASES, "exchanges", num_tokens, moe_tp, 20, in_graph, backend="nccl"
    )
    for errors in results:
        # Each rank's part is rounded once, and so is their sum.
        assert max(errors) <= 2 * torch.finfo(torch.bfloat16).eps
