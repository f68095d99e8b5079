"""The kernel in one process: memory of two ranks side by side, the peer's signals set beforehand.

Between GPUs it is tested by tests/executor/test_peer_memory.py.
"""

import pytest
import torch

from rankwright.kernels.all_reduce import MAX_PROGRAMS, Peers, sum_parts
from rankwright.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("with_norm", [False, True])
def test_every_rank_gets_the_sum_of_all_parts(
    dtype: torch.dtype, world_size: int, tokens: int, with_norm: bool, device: str
) -> None:
    dim, offset = 70, 7
    values = offset + tokens * dim + (tokens * dim + offset) % 2  # the words stand aligned
    words = MAX_PROGRAMS * world_size
    signal_word = values * dtype.itemsize // 4
    memory = [
        torch.empty(signal_word + words, dtype=torch.int32, device=device)
        for _ in range(world_size)
    ]
    parts = [torch.randn(tokens, dim, device=device).to(dtype) for _ in range(world_size)]
    calls = 5
    for rank in range(world_size):
        view = memory[rank].view(dtype)
        view[offset : offset + tokens * dim] = parts[rank].flatten()
        memory[rank][signal_word:] = calls  # as if the peers had come to this call
    table = torch.tensor([one.data_ptr() for one in memory], dtype=torch.int64, device=device)
    residual, weight = (
        torch.randn(tokens, dim, device=device).to(dtype),
        torch.randn(dim, device=device).to(dtype),
    )
    total = torch.stack(parts).float().sum(0).to(dtype)
    expected_residual = residual.clone()
    expected = (
        rms_norm(total, weight, 1e-5, expected_residual, backend="reference")
        if with_norm
        else total
    )
    outs = []
    for rank in range(world_size):
        own_residual = residual.clone()
        epochs = torch.full((MAX_PROGRAMS,), calls - 1, dtype=torch.int32, device=device)
        out = sum_parts(
            torch.empty(tokens, dim, dtype=dtype, device=device),
            Peers(
                table_address=table.data_ptr(),
                words=memory[rank][signal_word:],
                epochs=epochs,
                signal_word=signal_word,
                rank=rank,
                world_size=world_size,
            ),
            offset,
            weight_D=weight if with_norm else None,
            eps=1e-5,
            residual_TD=own_residual if with_norm else None,
        )
        outs.append(out)
        tolerance = 4 * torch.finfo(dtype).eps
        assert (out.float() - expected.float()).norm() <= tolerance * expected.float().norm()
        if with_norm:
            assert torch.equal(own_residual, expected_residual)
        assert epochs[:tokens].tolist() == [calls] * tokens
        assert epochs[tokens:].tolist() == [calls - 1] * (MAX_PROGRAMS - tokens)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_rank_tells_each_peer_in_that_peers_memory(device: str) -> None:
    memory = [torch.zeros(MAX_PROGRAMS * 2 + 2, dtype=torch.int32, device=device) for _ in range(2)]
    memory[0][2:] = 9
    table = torch.tensor([one.data_ptr() for one in memory], dtype=torch.int64, device=device)
    epochs = torch.full((MAX_PROGRAMS,), 8, dtype=torch.int32, device=device)
    peers = Peers(table.data_ptr(), memory[0][2:], epochs, signal_word=2, rank=0, world_size=2)
    sum_parts(torch.empty(2, 1, device=device), peers, 0)
    # Rank 1's words: program p has one from each rank, [p * 2 + sender].
    assert memory[1][2:8].tolist() == [9, 0, 9, 0, 0, 0]


def test_a_count_that_overflows_still_meets(device: str) -> None:
    memory = torch.zeros(MAX_PROGRAMS * 2 + 2, dtype=torch.int32, device=device)
    memory[2:] = -(2**31)
    table = torch.tensor([memory.data_ptr()] * 2, dtype=torch.int64, device=device)
    epochs = torch.full((MAX_PROGRAMS,), 2**31 - 1, dtype=torch.int32, device=device)
    peers = Peers(table.data_ptr(), memory[2:], epochs, signal_word=2, rank=0, world_size=2)
    sum_parts(torch.empty(1, 1, device=device), peers, 0)
    assert int(epochs[0]) == -(2**31)
