"""The replica with the least to do takes the next request."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.executor.router import Load, choose_replica

loads = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 100)), min_size=1, max_size=16
).map(lambda pairs: [Load(i, tokens, requests) for i, (tokens, requests) in enumerate(pairs)])


def test_fewest_outstanding_tokens_win_over_fewest_requests() -> None:
    assert choose_replica([Load(0, 500, 1), Load(1, 499, 9)]) == 1


def test_the_lower_number_wins_a_tie() -> None:
    assert choose_replica([Load(1, 5, 1), Load(0, 5, 1)]) == 0


def test_no_replica_is_an_error() -> None:
    with pytest.raises(ValueError, match="no replica"):
        choose_replica([])


@settings(deadline=None)  # a loaded machine is no error
@given(loads, st.randoms())
def test_no_replica_has_less_to_do_than_the_chosen_one(loads: list[Load], random: Random) -> None:
    shuffled = list(loads)
    random.shuffle(shuffled)
    chosen = choose_replica(loads)
    assert choose_replica(shuffled) == chosen
    assert loads[chosen].outstanding_tokens == min(load.outstanding_tokens for load in loads)


@settings(deadline=None)  # a loaded machine is no error
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(1, 8))
def test_replicas_never_differ_by_more_than_the_largest_request(
    sizes: list[int], num_replicas: int
) -> None:
    tokens = [0] * num_replicas
    for size in sizes:
        chosen = choose_replica([Load(i, held, 0) for i, held in enumerate(tokens)])
        tokens[chosen] += size
    assert max(tokens) - min(tokens) <= max(sizes)
