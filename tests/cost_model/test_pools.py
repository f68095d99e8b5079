"""Pools are matched, transfers are priced by hand, and rates obey their bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwright.cost_model.pools import match_pools, predict_pools, transfer_seconds
from rankwright.cost_model.predict import predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
LOAD = Workload(input_tokens=4000, output_tokens=500)
PREFILL = Split(stage_layers=(32,), chunk_tokens=8192)
DECODE = Split(tp=2, stage_layers=(32,), max_batch_size=64)


@given(
    st.floats(0.1, 50), st.floats(0.1, 50), st.integers(1, 4), st.integers(1, 4), st.integers(8, 32)
)
def test_no_other_match_serves_more(
    prefill_per_s: float, decode_per_s: float, g: int, h: int, gpus: int
) -> None:
    x, y = match_pools(prefill_per_s, decode_per_s, g, h, gpus)
    assert x >= 1
    assert y >= 1
    assert x * g + y * h <= gpus
    served = min(x * prefill_per_s, y * decode_per_s)
    for other in range(1, gpus // g + 1):
        left = (gpus - other * g) // h
        if left >= 1:
            assert min(other * prefill_per_s, left * decode_per_s) <= served * (1 + 1e-12)


def test_the_cache_of_a_prompt_over_one_link_by_hand() -> None:
    # 131,072 bytes a token on one GPU, 4,000 tokens: 524 MB; two ranks receive half each, but one
    # GPU sends, at 0.7 of 450 GB/s.
    seconds = transfer_seconds(LLAMA, parse_cluster("8xh100-sxm"), LOAD, PREFILL, DECODE)
    assert seconds == pytest.approx(131072 * 4000 / (0.7 * 450e9), rel=0.01)
    # Two ranks send to four: 32,768 bytes a token for each receiver, two of them at each sender.
    two = PREFILL.model_copy(update={"tp": 2})
    four = DECODE.model_copy(update={"tp": 4})
    halves = transfer_seconds(LLAMA, parse_cluster("8xh100-sxm"), LOAD, two, four)
    assert halves == pytest.approx(65536 * 4000 / (0.7 * 450e9), rel=0.01)
    far = transfer_seconds(LLAMA, parse_cluster("2x8xh100-sxm+ib400"), LOAD, PREFILL, DECODE)
    assert far == pytest.approx(131072 * 4000 / (0.72 * 50e9), rel=0.01)


def test_pools_of_a_machine() -> None:
    cluster = parse_cluster("8xh100-sxm")
    pools = predict_pools(LLAMA, cluster, LOAD, PREFILL, DECODE)
    assert pools.num_gpus == pools.prefill_workers + 2 * pools.decode_workers <= 8
    # No prompt stands in the way of a token: faster than the same replica doing both.
    both = predict(LLAMA, cluster, LOAD, DECODE)
    assert pools.tpot_s.value < both.tpot_s.value
    assert pools.output_tokens_per_s.value == pytest.approx(500 * pools.requests_per_s)
    assert pools.transfer_s < pools.ttft_s.value / 5


def test_no_more_is_served_than_arrives_and_waits_shrink() -> None:
    cluster = parse_cluster("8xh100-sxm")
    full = predict_pools(LLAMA, cluster, LOAD, PREFILL, DECODE)
    slow = LOAD.model_copy(update={"request_rate": 0.5})
    calm = predict_pools(LLAMA, cluster, slow, PREFILL, DECODE)
    assert calm.requests_per_s == 0.5
    assert calm.ttft_s.value < full.ttft_s.value


def test_two_workers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="need 3; there are 2"):
        predict_pools(LLAMA, parse_cluster("8xh100-sxm"), LOAD, PREFILL, DECODE, num_gpus=2)
