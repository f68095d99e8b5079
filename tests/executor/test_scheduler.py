"""The scheduler against a model of the cache: every slot a step reads holds what it should."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.executor.continuation import continued
from rankwright.executor.messages import FinishReason, Sampling, Tokens
from rankwright.executor.scheduler import Scheduler
from rankwright.executor.sequence import Sequence
from rankwright.executor.step_batch import Continuation, StepBatch


def make(**changes: int | bool) -> Scheduler:
    sizes = {
        "num_blocks": 8,
        "block_tokens": 4,
        "max_num_seqs": 4,
        "max_batched_tokens": 8,
        "max_model_len": 24,
    }
    return Scheduler(**{**sizes, **changes}, eos_token_ids=(0,))  # type: ignore[arg-type]


def next_token(context: list[int]) -> int:
    """A stand-in for a model: the next token depends on every token before it."""
    return 1 + (sum((i + 1) * token for i, token in enumerate(context)) * 31 + 7) % 97


class Cache:
    """Slots of the paged cache, filled and read as a forward pass does."""

    def __init__(self, block_tokens: int, depth: int) -> None:
        self.block_tokens = block_tokens
        self.depth = depth
        self.slots: dict[tuple[int, int], int] = {}
        self.drawn: dict[int, list[int]] = {}
        self.last: StepBatch | None = None

    def told(self, batch: StepBatch) -> StepBatch:
        """Return the batch as it travels."""
        if batch.continues is None:
            return StepBatch.decode(batch.encode())
        assert self.last is not None
        heard = continued(self.last, Continuation.decode(batch.continues.encode()))
        assert heard.encode() == batch.encode()
        return heard

    def run(self, batch: StepBatch) -> list[int]:
        batch = self.last = self.told(batch)
        parts = batch.parts_S.repeat(batch.query_lens_S)
        slots = batch.slots(self.block_tokens)
        for part, slot, token in zip(parts, slots, batch.token_ids_T, strict=True):
            earlier = self.drawn.get(batch.step - self.depth, [])
            known = int(token) if token >= 0 else earlier[-1 - int(token)]
            self.slots[int(part), int(slot)] = known
        ends = batch.query_lens_S.cumsum() - 1
        drawn = []
        for row in batch.sample_rows_R:
            index = int((ends == row).argmax())
            context = [
                self.slots[
                    int(batch.parts_S[index]),
                    int(batch.block_tables_SN[index, p // self.block_tokens]) * self.block_tokens
                    + p % self.block_tokens,
                ]
                for p in range(int(batch.context_lens_S[index]))
            ]
            drawn.append(next_token(context))
        self.drawn[batch.step] = drawn
        return drawn


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def drain(scheduler: Scheduler, requests: dict[str, tuple[list[int], int]]) -> dict[str, list[int]]:
    cache = Cache(scheduler.room.block_tokens, scheduler.depth)
    out: dict[str, list[int]] = {name: [] for name in requests}
    waiting = deque(requests.items())
    in_flight: deque[tuple[list[Sequence], list[int]]] = deque()
    for _ in range(10_000):
        if waiting:  # requests arrive one a step
            name, (prompt, count) = waiting.popleft()
            scheduler.add(name, prompt, Sampling(max_tokens=count))
        scheduled = scheduler.schedule()
        if scheduled is not None:
            batch, sampled = scheduled
            share = max(1, scheduler.max_batched_tokens // len(scheduler.room.pools))
            tokens_of = np.bincount(batch.parts_S, batch.query_lens_S)
            assert tokens_of.max() <= share
            assert len(scheduler.running) <= scheduler.max_num_seqs
            assert scheduler.ahead or (batch.token_ids_T >= 0).all()
            in_flight.append((sampled, cache.run(batch)))
        if in_flight and (scheduled is None or len(in_flight) >= scheduler.max_in_flight):
            for news in scheduler.complete(*in_flight.popleft()).each():
                out[news.request_id] += news.token_ids
        if not waiting and not in_flight and not scheduler.has_work:
            return out
    raise AssertionError("the scheduler never finished")


@given(
    prompts=st.lists(
        st.tuples(
            # Of few tokens, so that many prompts begin alike.
            st.lists(st.integers(1, 2), min_size=1, max_size=20),
            st.integers(1, 12),
        ),
        min_size=1,
        max_size=9,
    ),
    cache_tokens=st.integers(40, 90),
    block_tokens=st.sampled_from([1, 4, 16]),
    max_num_seqs=st.integers(1, 6),
    max_batched_tokens=st.integers(1, 30),
    depth_and_ahead=st.sampled_from([(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1)]),
    num_parts=st.integers(1, 3),
    prefix_cache=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_request_gets_the_tokens_it_would_get_alone(
    prompts: list[tuple[list[int], int]],
    cache_tokens: int,
    block_tokens: int,
    max_num_seqs: int,
    max_batched_tokens: int,
    depth_and_ahead: tuple[int, int],
    num_parts: int,
    prefix_cache: bool,
) -> None:
    depth, ahead = depth_and_ahead
    scheduler = make(
        num_blocks=-(-cache_tokens // block_tokens),
        block_tokens=block_tokens,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        max_model_len=40,
        depth=depth,
        ahead=ahead,
        num_parts=num_parts,
        prefix_cache=prefix_cache,
    )
    requests = {f"r{i}": prompt for i, prompt in enumerate(prompts)}
    out = drain(scheduler, requests)
    for name, (prompt, count) in requests.items():
        assert out[name] == expected(prompt, min(count, 40 - len(prompt)))
    assert scheduler.room.num_free_blocks == scheduler.room.pools[0].num_blocks * len(
        scheduler.room.pools
    )


def test_requests_join_the_part_with_most_room() -> None:
    scheduler = make(num_parts=2, max_batched_tokens=60)
    for name, tokens in (("long", 20), ("short", 4), ("next", 4), ("last", 4)):
        scheduler.add(name, [1] * tokens, Sampling(max_tokens=2))
    scheduled = scheduler.schedule()
    assert scheduled is not None
    # Two sequences a part at most; the long one's part has the least room.
    assert scheduled[0].parts_S.tolist() == [0, 1, 1, 0]


def start(scheduler: Scheduler, name: str, prompt: list[int]) -> tuple[int, list[int]]:
    """Return how many tokens of a new request its first step computes, and its blocks."""
    scheduler.add(name, prompt, Sampling(max_tokens=9))
    scheduled = scheduler.schedule()
    assert scheduled is not None
    batch, sampled = scheduled
    assert sampled[-1].request_id == name  # after those that decode
    scheduler.complete(sampled, [9] * len(sampled))
    return int(batch.query_lens_S[-1]), batch.block_tables_SN[-1].tolist()


def test_a_prompt_that_begins_like_another_shares_its_full_blocks() -> None:
    scheduler = make(prefix_cache=True, max_batched_tokens=16)
    computed, first = start(scheduler, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert computed == 9
    computed, second = start(scheduler, "b", [1, 2, 3, 4, 5, 6, 7, 8, 8])
    assert computed == 1
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert scheduler.num_reused_tokens == 8
    assert scheduler.room.num_free_blocks == 4  # two shared, one of each
    scheduler.abort("a")
    assert scheduler.room.num_free_blocks == 5  # b still holds what they shared
    # The same tokens after others are other blocks.
    assert start(scheduler, "c", [5, 6, 7, 8, 1])[0] == 5


def test_the_last_token_of_a_known_prompt_is_computed() -> None:
    scheduler = make(prefix_cache=True)
    start(scheduler, "a", [1, 2, 3, 4])
    assert start(scheduler, "b", [1, 2, 3, 4])[0] == 4


def test_the_block_longest_unused_goes_first_and_the_last_of_a_sequence_before_its_first() -> None:
    scheduler = make(prefix_cache=True, num_blocks=5, max_batched_tokens=16)
    for name, prompt in (("a", [1] * 9), ("b", [2] * 5)):
        start(scheduler, name, prompt)
        scheduler.abort(name)
    # Two blocks were never full; of those known the longest unused is the second of a.
    start(scheduler, "c", [3] * 9)
    scheduler.abort("c")
    assert start(scheduler, "d", [1] * 9)[0] == 5
    scheduler.abort("d")
    assert start(scheduler, "e", [3] * 9)[0] == 1  # what d took was of b, unused for longer than c


def test_without_the_cache_nothing_is_shared() -> None:
    scheduler = make(max_batched_tokens=16)
    start(scheduler, "a", [1] * 8)
    assert start(scheduler, "b", [1] * 8)[0] == 8
    assert scheduler.num_reused_tokens == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_too_little_memory_sends_the_youngest_back_and_still_finishes(ahead: int) -> None:
    scheduler = make(num_blocks=6, max_num_seqs=4, ahead=ahead)
    requests = {f"r{i}": ([i + 1] * 6, 14) for i in range(4)}
    out = drain(scheduler, requests)
    assert out == {name: expected(*request) for name, request in requests.items()}


def test_a_long_prompt_is_cut_into_chunks_that_leave_room_for_decodes() -> None:
    scheduler = make(max_batched_tokens=8)
    scheduler.add("short", [1, 2], Sampling(max_tokens=5))
    first = scheduler.schedule()
    assert first is not None
    scheduler.complete(first[1], [9])
    scheduler.add("long", [3] * 15, Sampling(max_tokens=1))
    second = scheduler.schedule()
    assert second is not None
    assert second[0].query_lens_S.tolist() == [1, 7]
    assert second[0].num_decodes == 1
    assert [sequence.request_id for sequence in second[1]] == ["short"]


def test_eos_ends_a_sequence_unless_ignored() -> None:
    cases: tuple[tuple[bool, FinishReason], ...] = ((False, "stop"), (True, None))
    for ignore, reason in cases:
        scheduler = make()
        scheduler.add("a", [1], Sampling(max_tokens=5, ignore_eos=ignore))
        scheduled = scheduler.schedule()
        assert scheduled is not None
        assert scheduler.complete(scheduled[1], [0]).each() == [
            Tokens(request_id="a", token_ids=(0,), finish_reason=reason)
        ]


def test_a_step_ahead_goes_on_from_a_row_of_the_step_before() -> None:
    scheduler = make(ahead=1)
    scheduler.add("a", [5, 6], Sampling(max_tokens=4))
    scheduler.add("b", [7], Sampling(max_tokens=2))
    first, second, third = (scheduler.schedule() for _ in range(3))
    assert first is not None
    assert second is not None
    assert second[0].token_ids_T.tolist() == [-1, -2]
    assert second[0].context_lens_S.tolist() == [3, 2]
    assert second[0].sample_positions_R.tolist() == [3, 2]
    assert third is None  # no more than one ahead
    scheduler.complete(first[1], [11, 12])
    third = scheduler.schedule()
    assert third is not None
    assert third[0].token_ids_T.tolist() == [-1]  # b will have its two tokens
    assert scheduler.complete(second[1], [13, 14]).token_ids == (13, 14)


def test_a_step_that_only_goes_on_is_told_by_what_differs_from_the_last() -> None:
    scheduler = make(ahead=1, num_blocks=9)
    for name, length, count in (("a", 2, 9), ("b", 1, 3), ("c", 3, 9)):
        scheduler.add(name, [9] * length, Sampling(max_tokens=count, ignore_eos=True, top_k=length))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert first[0].continues is None
    batches, before = [second[0]], first[1]
    for _ in range(2):
        scheduler.complete(before, [7] * len(before))
        decided = scheduler.schedule()
        assert decided is not None
        before, batch = second[1], decided[0]
        batches.append(batch)
        second = decided
    told = [batch.continues for batch in batches]
    assert all(one is not None for one in told)
    assert [one.kept_R is None for one in told if one is not None] == [True, True, False]
    assert [batch.token_ids_T.tolist() for batch in batches] == [[-1, -2, -3]] * 2 + [[-1, -3]]
    assert [batch.context_lens_S.tolist() for batch in batches] == [[3, 2, 4], [4, 3, 5], [5, 6]]
    assert [batch.top_k_R.tolist() for batch in batches] == [[2, 1, 3]] * 2 + [[2, 3]]
    # Each gets its second block with its fifth token.
    tables = [batch.block_tables_SN.tolist() for batch in batches]
    assert tables == [[[0], [1], [2]], [[0, 0], [1, 0], [2, 3]], [[0, 4], [2, 3]]]
    assert max(len(one.encode()) for one in told if one is not None) <= 36


def test_a_request_that_comes_or_goes_is_not_missed_by_steps_that_go_on() -> None:
    scheduler = make(ahead=1)
    for name in "ab":
        scheduler.add(name, [5], Sampling(max_tokens=9, ignore_eos=True))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert scheduler.abort("a")
    scheduler.add("c", [6, 6], Sampling(max_tokens=9))
    scheduler.complete(first[1], [7, 7])
    third = scheduler.schedule()
    assert third is not None
    assert third[0].token_ids_T.tolist() == [-2, 6, 6]
    assert [one.request_id for one in third[1]] == ["b", "c"]
    assert third[0].continues is None
    scheduler.complete(second[1], [7, 7])
    fourth = scheduler.schedule()
    assert fourth is not None
    assert fourth[0].continues is not None
    assert fourth[0].token_ids_T.tolist() == [-1, -2]
    assert fourth[0].context_lens_S.tolist() == [4, 3]


def test_in_a_pipeline_a_step_ahead_goes_on_from_the_step_one_round_before() -> None:
    scheduler = make(ahead=1, depth=2, max_batched_tokens=2)
    scheduler.add("a", [5, 6], Sampling(max_tokens=4))
    scheduler.add("b", [7, 8], Sampling(max_tokens=4))
    first, second, third, fourth = (scheduler.schedule() for _ in range(4))
    assert first is not None
    assert second is not None
    assert third is not None
    assert [one.request_id for one in first[1] + second[1] + third[1]] == ["a", "b", "a"]
    assert third[0].token_ids_T.tolist() == [-1]
    assert third[0].step == 2
    assert fourth is not None  # the engine would take in the first before it asks for more
    assert [one.request_id for one in fourth[1]] == ["b"]
    assert scheduler.schedule() is None


@pytest.mark.parametrize("how", ["stop", "abort"])
def test_what_came_too_much_is_dropped_and_its_blocks_are_free_then(how: str) -> None:
    scheduler = make(ahead=1)
    scheduler.add("a", [5, 6, 7, 8], Sampling(max_tokens=9))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    if how == "abort":
        assert scheduler.abort("a")
    news = scheduler.complete(first[1], [0]).each()
    assert [one.finish_reason for one in news] == ([] if how == "abort" else ["stop"])
    assert scheduler.room.num_free_blocks == 6  # the step in flight writes to them
    assert scheduler.schedule() is None
    assert scheduler.complete(second[1], [9]).each() == []
    assert scheduler.room.num_free_blocks == 8


def test_an_aborted_request_in_flight_gives_its_blocks_back_when_it_returns() -> None:
    scheduler = make()
    scheduler.add("a", [1] * 5, Sampling(max_tokens=5))
    scheduled = scheduler.schedule()
    assert scheduled is not None
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert scheduler.room.num_free_blocks == 6
    assert scheduler.complete(scheduled[1], [3]).each() == []
    assert scheduler.room.num_free_blocks == 8
    assert not scheduler.has_work


def test_a_prompt_without_room_for_a_token_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"the prompt has 24 tokens; expected 1 to 23"):
        make().add("a", [1] * 24, Sampling())


def test_a_step_batch_survives_the_wire() -> None:
    scheduler = make()
    scheduler.add("a", [5, 6, 7], Sampling(temperature=0.5, top_p=0.9, top_k=3, seed=11))
    scheduled = scheduler.schedule()
    assert scheduled is not None
    batch = StepBatch.decode(scheduled[0].encode())
    assert batch.token_ids_T.tolist() == [5, 6, 7]
    assert batch.positions().tolist() == [0, 1, 2]
    assert batch.seeds_R.tolist() == [11]
    assert batch.temperature_R.tolist() == [0.5]
    assert not batch.greedy
    assert batch.sample_positions_R.tolist() == [3]


@pytest.mark.parametrize(
    ("depth", "decoding", "prompt", "chunks"),
    [
        (1, 2, 600, [600]),
        (2, 2, 600, [300, 300]),
        (3, 2, 600, [256, 256, 88]),
        (2, 0, 600, [512, 88]),
        (2, 0, 2000, [1000, 1000]),
        (2, 0, 6000, [2048, 2048, 1904]),
    ],
)
def test_a_pipeline_shares_prompts_out_over_the_batches_of_a_round(
    depth: int, decoding: int, prompt: int, chunks: list[int]
) -> None:
    scheduler = make(num_blocks=10_000, max_batched_tokens=2048, max_model_len=8192, depth=depth)
    for index in range(decoding):
        scheduler.add(f"d{index}", [1], Sampling(max_tokens=100, ignore_eos=True))
    for _ in range(2 * depth):
        started = scheduler.schedule()
        if started is not None:
            scheduler.complete(started[1], [5] * len(started[1]))
    scheduler.add("p", range(prompt), Sampling(max_tokens=4, ignore_eos=True))
    found = []
    for _ in range(len(chunks) + depth):
        batch, sampled = scheduler.schedule() or (None, [])
        if batch is not None and batch.num_sequences > batch.num_decodes:
            found.append(batch.num_tokens - batch.num_decodes)
        scheduler.complete(sampled, [5] * len(sampled))
    assert found == chunks
