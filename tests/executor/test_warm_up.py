"""What is computed before requests come: within the limits, and the largest step first."""

from hypothesis import given
from hypothesis import strategies as st

from rankwright.executor.rank_batch import Parts
from rankwright.executor.warm_up import warm_up_batches
from rankwright.planner.plan import Limits


@given(
    max_num_seqs=st.integers(1, 100),
    max_batched_tokens=st.integers(1, 700),
    max_model_len=st.integers(2, 700),
    ranks=st.sampled_from((1, 2, 8)),
    cp=st.sampled_from((1, 2)),
)
def test_batches_keep_the_limits_and_begin_with_the_largest(
    max_num_seqs: int, max_batched_tokens: int, max_model_len: int, ranks: int, cp: int
) -> None:
    limits = Limits(
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        max_model_len=max_model_len,
    )
    parts = Parts(16, attention_ranks=1 if cp > 1 else ranks, cp=cp)
    batches = list(warm_up_batches(limits, parts))
    for batch in batches:
        assert batch.num_tokens <= max_batched_tokens
        assert batch.num_decodes < max(max_num_seqs, 1)
        assert batch.context_lens_S.max() < max_model_len
    sizes = [batch.num_tokens for batch in batches]
    assert not sizes or sizes[0] == max(sizes)


def test_the_largest_step_is_as_large_as_a_step_can_be() -> None:
    limits = Limits(max_num_seqs=64, max_batched_tokens=8192, max_model_len=16384)
    first, *others = warm_up_batches(limits, Parts(16))
    assert (first.num_tokens, first.num_decodes, first.num_samples) == (8192, 63, 64)
    assert {batch.query_lens_S[-1] for batch in others} == {2, 17, 33, 65, 512}
