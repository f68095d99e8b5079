"""The kernel in one process: what the peers sent stands there beforehand.

Ranks that run at once: tests/executor/test_peer_sums.py, and between GPUs
tests/executor/test_peer_memory.py.
"""

from typing import Any

import pytest
import torch

from rankwright.kernels.pushed_sum import arrivals_words, sum_pushed_parts
from rankwright.kernels.rms_norm import rms_norm

NUMBER_LEFT = -7  # no call has this one


def messages(part: torch.Tensor, number: int) -> torch.Tensor:
    """Return what a rank sends of its part: two values a word, and the number of the call."""
    words = part.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return words | number << 32


class Ranks:
    """Memory of each rank, with the parts of its peers in it."""

    def __init__(self, parts: list[torch.Tensor], epoch: int, max_rows: int, offset: int) -> None:
        self.parts, self.offset, self.max_rows = parts, offset, max_rows
        self.ranks, (self.tokens, self.dim) = len(parts), parts[0].shape
        self.epoch, self.device = epoch, parts[0].device
        self.number = (epoch + 1 + 2**31) % 2**32 - 2**31  # int32 that goes on past its end
        size = arrivals_words(max_rows, self.dim, self.ranks)
        self.memory = []
        for rank in range(self.ranks):
            memory = torch.full((offset + size,), NUMBER_LEFT << 32, device=self.device)
            for source in range(self.ranks):
                if source != rank:
                    self.arrived(memory, source).copy_(messages(parts[source], self.number))
            self.memory.append(memory)
        self.table = torch.tensor([one.data_ptr() for one in self.memory], device=self.device)

    def arrived(self, memory: torch.Tensor, source: int) -> torch.Tensor:
        """Return the place in a rank's memory for a peer's part of this call."""
        places = memory[self.offset :].view(2, self.ranks, self.max_rows, self.dim // 2)
        return places[self.number % 2, source, : self.tokens]

    def sum(self, rank: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a rank's result and how often its rows have been summed."""
        epochs = torch.full((self.max_rows,), self.epoch, dtype=torch.int32, device=self.device)
        part = self.parts[rank]
        out = sum_pushed_parts(
            part,
            torch.empty(part.shape, dtype=part.dtype, device=self.device),
            table_address=self.table.data_ptr(),
            arrivals=self.memory[rank][self.offset :],
            epochs=epochs,
            word_offset=self.offset,
            max_rows=self.max_rows,
            rank=rank,
            world_size=self.ranks,
            **options,
        )
        return out, epochs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("tokens", "dim", "epoch"), [(1, 64, 0), (4, 70, 2**31 - 1)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_every_rank_gets_the_sum_of_all_parts(
    dtype: torch.dtype,
    world_size: int,
    tokens: int,
    dim: int,
    with_norm: bool,
    epoch: int,
    device: str,
) -> None:
    wide = [torch.randn(tokens, 2 * dim, device=device).to(dtype) for _ in range(world_size)]
    parts = [part[:, :dim] for part in wide]  # strided rows
    ranks = Ranks(parts, epoch, max_rows=5, offset=3)
    given = torch.randn(tokens, 2 * dim, device=device).to(dtype)[:, :dim]
    weight = torch.randn(dim, device=device).to(dtype)
    expected = torch.stack(parts).float().sum(0).to(dtype)
    expected_residual = given.clone()
    if with_norm:
        expected = rms_norm(expected, weight, 1e-5, expected_residual, backend="reference")
    outs = []
    for rank in range(world_size):
        residual = torch.empty(tokens, 2 * dim, dtype=dtype, device=device)[:, :dim]
        residual.copy_(given)
        norm = {"weight_D": weight, "eps": 1e-5, "residual_TD": residual} if with_norm else {}
        out, epochs = ranks.sum(rank, **norm)
        outs.append(out)
        tolerance = 4 * torch.finfo(dtype).eps
        assert (out.float() - expected.float()).norm() <= tolerance * expected.float().norm()
        if with_norm:
            assert torch.equal(residual, expected_residual)
        assert epochs.tolist() == [ranks.number] * tokens + [epoch] * (5 - tokens)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_rank_writes_its_part_with_the_number_of_the_call_to_every_peer_and_nothing_else(
    device: str,
) -> None:
    parts = [torch.randn(2, 12, device=device).bfloat16() for _ in range(3)]
    ranks = Ranks(parts, epoch=8, max_rows=4, offset=2)
    for memory in ranks.memory:
        ranks.arrived(memory, 1).fill_(NUMBER_LEFT << 32)
    for source in (0, 2):
        ranks.arrived(ranks.memory[1], source).copy_(messages(parts[source], 9))
    before = [memory.clone() for memory in ranks.memory]
    ranks.sum(1)
    for rank in (0, 2):
        ranks.arrived(before[rank], 1).copy_(messages(parts[1], 9))
    assert all(torch.equal(memory, old) for memory, old in zip(ranks.memory, before, strict=True))


def test_no_rows_need_no_launch(device: str) -> None:
    ranks = Ranks([torch.randn(0, 8, device=device).half() for _ in range(2)], 0, 2, 0)
    out, epochs = ranks.sum(0)
    assert out.shape == (0, 8)
    assert epochs.tolist() == [0, 0]
