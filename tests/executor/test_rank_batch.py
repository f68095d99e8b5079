"""Parts of a step batch: together the ranks compute, cache and sample everything once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.executor.forward_context import ForwardContext
from rankwright.executor.rank_batch import Parts, RankBatch, rank_batch, tokens_before
from rankwright.executor.step_batch import StepBatch, made_up_batch

BLOCK = 4


@st.composite
def batches(draw: st.DrawFn, cp: int, num_parts: int) -> StepBatch:
    """Sequences that decode, then chunks of prompts, each somewhere in its context."""
    num_decodes = draw(st.integers(0, 3))
    chunks = draw(st.lists(st.integers(1, 20), min_size=int(num_decodes == 0), max_size=3))
    lens = np.array([1] * num_decodes + chunks, dtype=np.int64)
    before = draw(st.lists(st.integers(0, 30), min_size=len(lens), max_size=len(lens)))
    contexts = lens + np.array(before, dtype=np.int64)
    width = int(-(-contexts.max() // (BLOCK * cp)))
    order = np.arange(len(lens) * width, dtype=np.int32)
    rows = np.cumsum(lens) - 1
    sampled = draw(st.lists(st.booleans(), min_size=len(lens), max_size=len(lens)))
    sampled[:num_decodes] = [True] * num_decodes
    made = made_up_batch(1, decodes=0, sampled=False)
    return replace(
        made,
        num_decodes=num_decodes,
        query_lens_S=lens,
        context_lens_S=contexts,
        token_ids_T=np.arange(100, 100 + lens.sum()),
        block_tables_SN=order.reshape(len(lens), width),
        parts_S=np.array([draw(st.integers(0, num_parts - 1)) for _ in lens], dtype=np.int64),
        sample_rows_R=rows[sampled],
    )


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_ranks_compute_cache_and_sample_everything_once(
    data: st.DataObject, cp: int, num_parts: int
) -> None:
    batch = data.draw(batches(cp, num_parts))
    ranks: dict[tuple[int, int], RankBatch] = {
        (part, cp_rank): rank_batch(batch, Parts(BLOCK, num_parts, part, cp, cp_rank))
        for part in range(num_parts)
        for cp_rank in range(cp)
    }
    sequence_T = np.repeat(np.arange(len(batch.query_lens_S)), batch.query_lens_S)
    part_T, decodes_T = batch.parts_S[sequence_T], sequence_T < batch.num_decodes
    # Every token is computed by the ranks of its part: a prompt's by one, another's by all.
    for part in range(num_parts):
        computed = [token for rank in range(cp) for token in ranks[part, rank].token_ids_T if token]
        prompt = batch.token_ids_T[(part_T == part) & ~decodes_T].tolist()
        decode = batch.token_ids_T[(part_T == part) & decodes_T].tolist()
        assert sorted(computed) == sorted(prompt + decode * cp)
    # Every key has one slot on one rank, and no two keys share it.
    slots = [(key, int(slot)) for key, one in ranks.items() for slot in one.slots_T if slot >= 0]
    assert len(slots) == len(set(slots)) == batch.num_tokens
    # Ranks of a TP group, which gather from each other, have equally many rows.
    for cp_rank in range(cp):
        assert len({ranks[part, cp_rank].num_tokens for part in range(num_parts)}) == 1
        assert len({len(ranks[part, cp_rank].sample_rows_R) for part in range(num_parts)}) == 1
    # Each sampled row is where the order says, on one rank of its CP group.
    for number, row in enumerate(batch.sample_rows_R):
        one = ranks[0, 0]
        place = number
        part = 0
        if one.sampled_by_R is not None:
            part, place = (int(values[number]) for values in one.sampled_by_R)
        holders = [
            ranks[part, cp_rank].token_ids_T[ranks[part, cp_rank].sample_rows_R[place]]
            for cp_rank in range(cp)
            if ranks[part, cp_rank].sample_rows_R[place] >= 0
        ]
        assert holders == [batch.token_ids_T[row]]


@given(st.data(), st.integers(2, 4), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_gathered_blocks_hold_each_prompts_context_in_order(
    data: st.DataObject, cp: int, room: int
) -> None:
    batch = data.draw(batches(cp, 1))
    parts = [Parts(BLOCK, cp=cp, cp_rank=rank) for rank in range(cp)]
    ranks = [rank_batch(batch, part, max_gathered_blocks=room) for part in parts]
    groups = [len(one.gathers) for one in ranks]
    assert len(set(groups)) == 1  # each is a collective
    for number in range(groups[0]):
        gathers = [one.gathers[number] for one in ranks]
        blocks = gathers[0].blocks_M
        assert all((gather.blocks_M == blocks).all() for gather in gathers)
        # What each slot of the pool would hold: (block on the rank, rank).
        pool = [(int(block), rank) for rank in range(cp) for block in blocks]
        for one, gather in zip(ranks, gathers, strict=True):
            rows = range(*gather.rows)
            assert gather.query_starts[-1] == len(rows)
            for piece, context in enumerate(gather.context_lens):
                start, stop = gather.query_starts[piece], gather.query_starts[piece + 1]
                positions = one.positions_T[rows[start] : rows[stop - 1] + 1]
                assert positions.tolist() == list(range(context - (stop - start), context))
                token = one.token_ids_T[rows[start]]
                row = int((batch.token_ids_T == token).argmax())
                sequence = int(
                    np.repeat(np.arange(len(batch.query_lens_S)), batch.query_lens_S)[row]
                )
                table = batch.block_tables_SN[sequence]
                for block in range(-(-context // BLOCK)):
                    found = pool[gather.block_tables_PN[piece, block]]
                    assert found == (int(table[block // cp]), block % cp)


@given(st.integers(1, 5), st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_tokens_of_a_context_are_shared_out(cp: int, counts: list[int]) -> None:
    lens = np.array(counts, dtype=np.int64)
    shares = [tokens_before(lens, Parts(BLOCK, cp=cp, cp_rank=rank)) for rank in range(cp)]
    assert np.array_equal(np.sum(shares, axis=0), lens)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("cp", [1, 2, 3])
def test_what_is_seen_here_is_what_of_the_window_is_here(cp: int, window: int | None) -> None:
    contexts = torch.tensor([0, 1, 4, 7, 13, 50], dtype=torch.int32)
    seen = torch.zeros(len(contexts), dtype=torch.int64)
    for cp_rank in range(cp):
        parts = Parts(BLOCK, cp=cp, cp_rank=cp_rank)
        nothing = torch.zeros(0)
        context = ForwardContext(
            num_decodes=len(contexts),
            positions_T=nothing,
            slots_T=nothing,
            context_lens_S=contexts,
            block_tables_SN=nothing,
            cos_sin_PD=nothing,
            parts=parts,
        )
        lens, windows = context.seen_here(window)
        if cp == 1:
            assert windows is None
            assert lens.tolist() == contexts.tolist()
            return
        here = lens if windows is None else windows.where(lens > 0, 0)
        expected = [
            sum(
                position // BLOCK % cp == cp_rank
                for position in range(0 if window is None else max(0, length - window), length)
            )
            for length in contexts.tolist()
        ]
        assert here.tolist() == expected
        seen += here
    assert seen.tolist() == [min(length, window or length) for length in contexts.tolist()]
