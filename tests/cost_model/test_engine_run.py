"""Other engines: their scheduling, their memory, and laws that predictions of them keep."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.cost_model.engine_run import chunk_tokens, kv_capacity_tokens
from rankwright.cost_model.engines import ENGINE_ROWS
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels, choose_replicas, predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
LARGE = read_model("meta-llama/Llama-3.1-70B")
LOAD = Workload(input_tokens=1024, output_tokens=128)


def split_of(tp: int = 1, batch: int = 8, layers: int = 32, **more: Any) -> Split:
    return Split(tp=tp, stage_layers=(layers,), max_batch_size=batch, **more)


def test_cache_of_a_70b_model_by_hand() -> None:
    gpu = parse_cluster("1xh100-sxm").nodes[0].gpus[0]
    split = split_of(tp=8, layers=80)
    # 80 layers, one KV head of 128 on each of 8 ranks, keys and values in 2 bytes: 40,960 bytes.
    tokens = kv_capacity_tokens(LARGE, split, gpu, "vllm")
    weights = 141.1e9 / 8
    assert tokens == pytest.approx((0.9 * gpu.memory_bytes - weights - 4.5e9) / 40960, rel=0.05)
    # On one GPU it does not fit at all; a figure comes out all the same.
    assert kv_capacity_tokens(LARGE, split_of(layers=80), gpu, "vllm") == 1.0


def test_steps_are_as_large_as_the_engines_default_unless_the_split_says() -> None:
    assert chunk_tokens(split_of(), "vllm") == 8192
    assert chunk_tokens(split_of(chunk_tokens=512), "vllm") == 512
    assert chunk_tokens(split_of(), "rankwright") == 2048


def test_requests_wait_where_memory_is_full() -> None:
    cluster = parse_cluster("2xh100-sxm")
    long = Workload(input_tokens=8192, output_tokens=1024, concurrency=64)
    short = long.model_copy(update={"concurrency": 4})
    split = split_of(tp=2, batch=64, layers=80)
    float8 = LARGE.model_copy(
        update={
            "weight_dtypes": LARGE.weight_dtypes.model_copy(
                update={"attention": "float8", "feed_forward": "float8"}
            )
        }
    )
    full = predict(float8, cluster, long, split, "vllm")
    free = predict(float8, cluster, short, split, "vllm")
    # Measured on vLLM 0.12: 59 s and 0.74 s.
    assert 20 < full.ttft_s.value < 120
    assert 0.5 < free.ttft_s.value < 1.1
    assert full.batch_size < 64


def test_prompts_before_decoding_cost_ttft_and_save_tpot() -> None:
    cluster = parse_cluster("1xh100-sxm")
    load = Workload(input_tokens=2048, output_tokens=64, length_spread=0.0)
    made = {
        engine: predict(LLAMA, cluster, load, split_of(batch=64), engine)
        for engine in ("vllm", "sglang")
    }
    assert made["sglang"].ttft_s.value > 2 * made["vllm"].ttft_s.value
    assert made["sglang"].tpot_s.value < made["vllm"].tpot_s.value


def test_more_requests_than_slots_wait() -> None:
    cluster = parse_cluster("1xh100-sxm")
    eight = LOAD.model_copy(update={"concurrency": 8})
    many = LOAD.model_copy(update={"concurrency": 32})
    split = split_of(batch=8)
    few, queued = (predict(LLAMA, cluster, load, split, "vllm") for load in (eight, many))
    assert queued.ttft_s.value > 5 * few.ttft_s.value
    assert queued.tpot_s.value == pytest.approx(few.tpot_s.value, rel=0.1)


def test_a_low_rate_is_served_without_waiting() -> None:
    cluster = parse_cluster("1xh100-sxm")
    slow = LOAD.model_copy(update={"request_rate": 0.2})
    made = predict(LLAMA, cluster, slow, split_of(batch=64), "vllm")
    alone = predict(LLAMA, cluster, LOAD, split_of(batch=1), "vllm")
    assert made.tpot_s.value == pytest.approx(alone.tpot_s.value, rel=0.05)
    assert made.output_tokens_per_s.value == pytest.approx(0.2 * 128, rel=0.2)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(sorted(ENGINE_ROWS)),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 64),
    st.integers(16, 4096),
    st.integers(1, 128),
)
def test_any_engine_gives_sound_figures(
    engine: str, tp: int, batch: int, inputs: int, outputs: int
) -> None:
    load = Workload(input_tokens=inputs, output_tokens=outputs)
    made = predict(LLAMA, parse_cluster("8xh200-sxm"), load, split_of(tp, batch), engine)
    assert made.ttft_s.value > 0
    assert made.tpot_s.value > 0 or outputs == 1
    for one in (made.ttft_s, made.tpot_s, made.output_tokens_per_s):
        assert one.low <= one.value <= one.high
    # Tokens cannot come faster than each request in flight takes one step for each.
    if outputs > 1:
        assert made.output_tokens_per_s.value <= 1.2 * batch / made.tpot_s.value * outputs / (
            outputs - 1
        )


EXPERTS = read_model("Qwen/Qwen3-30B-A3B")


def test_ranks_with_sequences_of_their_own_fill_steps_and_hand_tokens_on_by_themselves() -> None:
    split = split_of(tp=4, layers=48, ep=4, attention="dp")
    # max_num_tokens is of each rank's scheduler; SGLang divides its chunk by the ranks.
    assert chunk_tokens(split, "trtllm") == 4 * 8192
    assert chunk_tokens(split, "sglang") == 8192
    cluster = parse_cluster("4xh200-sxm")
    hosts_s = []
    for attention in ("tp", "dp"):
        cut = split_of(tp=4, layers=48, ep=4, attention=attention)
        models = StageModels(EXPERTS, cluster, "trtllm")
        pipeline = models.pipeline_of(choose_replicas(cluster, cut)[0], cut)
        hosts_s.append(pipeline.stages[0].host_s(StepTokens(decode=1024)))
    assert hosts_s[0] == pytest.approx(4 * hosts_s[1])


def test_a_sequence_that_is_alone_passes_the_stages_one_after_another() -> None:
    # Two stages have room for two batches; one sequence is in one of them, whatever the room.
    cluster = parse_cluster("2xh100-sxm")
    load = LOAD.model_copy(update={"concurrency": 1})
    alone, room = (
        predict(
            EXPERTS,
            cluster,
            load,
            Split(pp=2, stage_layers=(24, 24), max_batch_size=batch, micro_batches=min(2, batch)),
            "vllm",
        )
        for batch in (1, 8)
    )
    assert room.tpot_s.value == pytest.approx(alone.tpot_s.value)
