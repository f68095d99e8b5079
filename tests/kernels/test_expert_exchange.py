"""The kernels in one process: memory of some ranks side by side, peers' signals set beforehand.

Between GPUs they are tested by tests/executor/test_expert_memory.py.
"""

import pytest
import torch

from rankwright.kernels.all_reduce import MAX_PROGRAMS
from rankwright.kernels.expert_exchange import (
    ExchangeMemory,
    combine_reference,
    combine_tokens,
    dispatch_reference,
    dispatch_tokens,
)

CAPACITY = 6
# First slot, and one past the last, of the ranks that share the experts out.
EXPERTS = [(0, 3), (3, 3), (3, 7)]


class Machine:
    """Memory of ranks that are called one after another."""

    def __init__(
        self, world_size: int, moe_tp: int, top_k: int, dim: int, dtype: torch.dtype, device: str
    ) -> None:
        self.world_size, self.moe_tp, self.dim, self.top_k = world_size, moe_tp, dim, top_k
        self.dtype, self.device = dtype, device
        rows = CAPACITY * world_size
        row_words = -(-rows * dim * dtype.itemsize // 16) * 4
        self.pair_words = -(-rows * top_k // 4) * 4
        self.at = [0, self.pair_words, 2 * self.pair_words]  # slots, weights, tokens
        self.at += [self.at[2] + row_words, self.at[2] + 2 * row_words]  # parts, words
        size = self.at[-1] + MAX_PROGRAMS * world_size
        self.memory = [
            torch.full((size,), -7, dtype=torch.int32, device=device) for _ in range(world_size)
        ]
        self.table = torch.tensor(
            [one.data_ptr() for one in self.memory], dtype=torch.int64, device=device
        )
        self.epochs = [
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device) for _ in self.memory
        ]
        starts = [first for first, _ in EXPERTS[: world_size // moe_tp]]
        starts.append(EXPERTS[world_size // moe_tp - 1][1])
        self.starts = torch.tensor(starts, dtype=torch.int32, device=device)

    def of(self, rank: int) -> ExchangeMemory:
        """What rank `rank` passes, its peers being there already."""
        self.memory[rank][self.at[4] :] = 1000
        values = 4 // self.dtype.itemsize
        return ExchangeMemory(
            table_address=self.table.data_ptr(),
            words=self.memory[rank][self.at[4] :],
            epochs=self.epochs[rank],
            signal_word=self.at[4],
            slots_word=self.at[0],
            weights_word=self.at[1],
            rows_offset=self.at[2] * values,
            parts_offset=self.at[3] * values,
            capacity=CAPACITY,
            rank=rank,
            world_size=self.world_size,
            moe_tp=self.moe_tp,
        )

    def rows(self, rank: int, part: int, count: int) -> torch.Tensor:
        """Tokens (2) or parts (3) in the memory of a rank."""
        view = self.memory[rank][self.at[part] : self.at[part + 1]].view(self.dtype)
        return view[: count * self.dim].view(count, self.dim)

    def pairs(self, rank: int, part: int, count: int) -> torch.Tensor:
        """Slots (0) or weights (1) in the memory of a rank."""
        start = self.at[part]
        view = self.memory[rank][start : start + count * self.top_k].view(count, self.top_k)
        return view if part == 0 else view.view(torch.float32)


def bits(values: torch.Tensor) -> torch.Tensor:
    """Numbers that compare as equal where all bits are."""
    return values.view(torch.int32 if values.dtype.itemsize == 4 else torch.int16)


@pytest.mark.parametrize(("dtype", "with_base"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(("world_size", "moe_tp"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("num_tokens", [1, CAPACITY])
def test_tokens_go_where_their_experts_are_and_their_sums_come_back(
    dtype: torch.dtype,
    world_size: int,
    moe_tp: int,
    num_tokens: int,
    with_base: bool,
    device: str,
) -> None:
    experts = EXPERTS[: world_size // moe_tp]
    dim, top_k = 70, 2
    machine = Machine(world_size, moe_tp, top_k, dim, dtype, device)
    tokens = []
    for _ in range(world_size):
        wide = torch.randn(num_tokens, dim + 5, device=device).to(dtype)
        order = torch.rand(num_tokens, experts[-1][1], device=device).argsort(1)
        slots = order[:, :top_k].to(torch.int32).contiguous()
        tokens.append((wide[:, :dim], torch.rand(num_tokens, top_k, device=device), slots))
    count = world_size * num_tokens
    before = [bits(machine.rows(rank, 2, count)).clone() for rank in range(world_size)]
    for rank, (x, weights, slots) in enumerate(tokens):
        dispatch_tokens(x, weights, slots, machine.starts, machine.of(rank))
    parts = []
    for rank, (rows, weights, slots) in enumerate(dispatch_reference(tokens, experts, moe_tp)):
        found = machine.pairs(rank, 0, count)
        assert torch.equal(found, slots)
        assert torch.equal(machine.pairs(rank, 1, count), weights)
        came = (slots >= 0).any(1)
        assert torch.equal(machine.rows(rank, 2, count)[came], rows[came])
        assert torch.equal(bits(machine.rows(rank, 2, count))[~came], before[rank][~came])
        machine.rows(rank, 3, count)[came] = rows[came] * (rank + 2)
        machine.rows(rank, 3, count)[~came] = float("nan")
        parts.append(machine.rows(rank, 3, count).clone())
    for rank, (x, _, slots) in enumerate(tokens):
        base = x.flip(0) if with_base else None
        out = combine_tokens(
            torch.full((num_tokens, dim), float("nan"), dtype=dtype, device=device),
            slots,
            machine.starts,
            machine.of(rank),
            base_TD=base,
        )
        expected = combine_reference(parts, slots, experts, moe_tp, rank)
        if base is not None:
            expected = (expected.float() + base.float()).to(dtype)
        assert torch.equal(out, expected)
        programs = num_tokens
        assert machine.epochs[rank][:programs].tolist() == [2] * programs
        assert not machine.epochs[rank][programs:].any()


def test_a_token_without_an_expert_stays_and_its_sum_is_zero(device: str) -> None:
    machine = Machine(2, 1, 2, 16, torch.float32, device)
    slots = torch.full((1, 2), -1, dtype=torch.int32, device=device)
    x = torch.ones(1, 16, device=device)
    before = machine.memory[1][machine.at[2] : machine.at[3]].clone()
    dispatch_tokens(x, torch.ones(1, 2, device=device), slots, machine.starts, machine.of(0))
    assert torch.equal(machine.memory[1][machine.at[2] : machine.at[3]], before)
    assert machine.pairs(1, 0, 1).tolist() == [[-1, -1]]
    out = combine_tokens(torch.ones(1, 16, device=device), slots, machine.starts, machine.of(0))
    assert not out.any()


def test_each_peer_is_told_in_its_own_memory(device: str) -> None:
    machine = Machine(2, 1, 1, 4, torch.float32, device)
    machine.memory[1][machine.at[4] :] = 0
    slots = torch.zeros(2, 1, dtype=torch.int32, device=device)
    x = torch.ones(2, 4, device=device)
    dispatch_tokens(x, torch.ones(2, 1, device=device), slots, machine.starts, machine.of(0))
    # Program p has a word from each rank, [p * 2 + sender].
    assert machine.memory[1][machine.at[4] :][:6].tolist() == [1, 0, 1, 0, 0, 0]


def test_more_tokens_than_room_are_refused(device: str) -> None:
    machine = Machine(2, 1, 1, 4, torch.float32, device)
    many = CAPACITY + 1
    slots = torch.zeros(many, 1, dtype=torch.int32, device=device)
    x, weights = torch.ones(many, 4, device=device), torch.ones(many, 1, device=device)
    with pytest.raises(ValueError, match="7 tokens of a rank, and there is room for 6"):
        dispatch_tokens(x, weights, slots, machine.starts, machine.of(0))
    with pytest.raises(ValueError, match="7 tokens of a rank, and there is room for 6"):
        combine_tokens(x, slots, machine.starts, machine.of(0))
