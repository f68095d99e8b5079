"""The kernel in one process: memory of all ranks side by side, the peers' signals set beforehand.

A rank's kernel then ends before the next begins, so each test runs all of them twice: what peers
write into a rank's memory in the first round has arrived in the second. Ranks that run at once:
tests/executor/test_peer_sums.py, and between GPUs tests/executor/test_peer_memory.py.
"""

from typing import Any

import pytest
import torch

from rankwright.kernels.all_reduce import MAX_PROGRAMS, Peers, sum_parts
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.two_shot_sum import sum_parts_in_two_shots

CALLS = 6  # meetings that the peers have been to, as the words say


class Ranks:
    """Memory of each rank: its part, room for what others summed, and its words."""

    def __init__(self, parts: list[torch.Tensor], offset: int) -> None:
        self.parts = parts
        tokens, dim = parts[0].shape
        self.dtype, self.device = parts[0].dtype, parts[0].device
        self.offset, self.arrivals = offset, offset + tokens * dim + 3
        values = self.arrivals + tokens * dim
        values += values % 2  # the words stand aligned
        self.signal_word = values * self.dtype.itemsize // 4
        words = MAX_PROGRAMS * len(parts)
        self.memory = []
        for part in parts:
            memory = torch.empty(self.signal_word + words, dtype=torch.int32, device=self.device)
            view = memory.view(self.dtype)
            view.fill_(torch.nan)
            view[offset : offset + part.numel()] = part.flatten()
            memory[self.signal_word :] = CALLS
            self.memory.append(memory)
        addresses = [one.data_ptr() for one in self.memory]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=self.device)

    def sum(
        self,
        rank: int,
        weight: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        *,
        one_shot: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a rank's result and how often its programs have met."""
        epochs = torch.full((MAX_PROGRAMS,), CALLS - 2, dtype=torch.int32, device=self.device)
        out = torch.empty(self.parts[0].shape, dtype=self.dtype, device=self.device)
        peers = Peers(
            table_address=self.table.data_ptr(),
            words=self.memory[rank][self.signal_word :],
            epochs=epochs,
            signal_word=self.signal_word,
            rank=rank,
            world_size=len(self.parts),
        )
        norm: dict[str, Any] = {"weight_D": weight, "eps": 1e-5, "residual_TD": residual}
        if one_shot:
            return sum_parts(out, peers, self.offset, **norm), epochs
        return sum_parts_in_two_shots(out, peers, self.offset, self.arrivals, **norm), epochs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "tokens"), [(2, 1), (3, 7), (4, 6)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_every_rank_gets_the_sum_of_all_parts(
    dtype: torch.dtype, world_size: int, tokens: int, with_norm: bool, device: str
) -> None:
    dim = 70
    parts = [torch.randn(tokens, dim, device=device).to(dtype) for _ in range(world_size)]
    ranks = Ranks(parts, offset=7)
    given = torch.randn(tokens, 2 * dim, device=device).to(dtype)[:, :dim]  # strided rows
    weight = torch.randn(dim, device=device).to(dtype) if with_norm else None
    expected = torch.stack(parts).float().sum(0).to(dtype)
    expected_residual = given.clone()
    if weight is not None:
        expected = rms_norm(expected, weight, 1e-5, expected_residual, backend="reference")
    programs = -(-tokens // world_size)
    outs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(2):
        outs = []
        for rank in range(world_size):
            residual = torch.empty(tokens, 2 * dim, dtype=dtype, device=device)[:, :dim]
            residual.copy_(given)
            out, epochs = ranks.sum(rank, weight, residual if with_norm else None)
            outs.append((out, residual))
            assert epochs[:programs].tolist() == [CALLS] * programs
            assert epochs[programs:].unique().tolist() == [CALLS - 2]
    tolerance = 4 * torch.finfo(dtype).eps
    for rank, (out, residual) in enumerate(outs):
        assert (out.float() - expected.float()).norm() <= tolerance * expected.float().norm()
        assert torch.equal(out, outs[0][0])
        if with_norm:
            assert torch.equal(residual, expected_residual)
        own_residual = given.clone()
        in_one_shot, _ = ranks.sum(rank, weight, own_residual if with_norm else None, one_shot=True)
        assert (in_one_shot.float() - out.float()).norm() <= tolerance * out.float().norm()


def test_each_rank_writes_its_share_of_the_rows_to_all_and_nothing_else(device: str) -> None:
    tokens, dim, world_size = 5, 12, 2
    parts = [torch.randn(tokens, dim, device=device) for _ in range(world_size)]
    ranks = Ranks(parts, offset=4)
    ranks.sum(1)
    for memory in ranks.memory:
        view = memory.view(torch.float32)
        arrived = view[ranks.arrivals : ranks.arrivals + tokens * dim].view(tokens, dim)
        assert torch.equal(arrived[1::2], (parts[0] + parts[1])[1::2])
        assert arrived[0::2].isnan().all()
        assert view[ranks.arrivals + tokens * dim : ranks.signal_word].isnan().all()
        assert view[ranks.arrivals - 3 : ranks.arrivals].isnan().all()


def test_no_rows_need_no_launch(device: str) -> None:
    ranks = Ranks([torch.randn(0, 8, device=device) for _ in range(2)], offset=0)
    out, epochs = ranks.sum(0)
    assert out.shape == (0, 8)
    assert epochs.unique().tolist() == [CALLS - 2]
