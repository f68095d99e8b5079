import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Cluster
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
LOAD = Workload(input_tokens=1024, output_tokens=128)


def split_of(tp: int = 1, pp: int = 1, dp: int = 1, batch: int = 8) -> Split:
    layers = tuple(32 // pp for _ in range(pp))
    return Split(tp=tp, pp=pp, dp=dp, stage_layers=layers, max_batch_size=batch)


def test_one_request_on_one_h100_is_bound_by_the_weights() -> None:
    one = Workload(input_tokens=128, output_tokens=128)
    made = predict(LLAMA, parse_cluster("1xh100-sxm"), one, split_of(batch=1))
    # 15 GB of weights at 3.35 TB/s are 4.5 ms; a prediction below would be impossible.
    assert 4.5e-3 < made.tpot_s.value < 9e-3
    assert made.ttft_s.low < made.ttft_s.value < made.ttft_s.high
    largest = max(made.decode_parts, key=lambda part: part.seconds)
    assert (largest.name, largest.bound) == ("mlp", "memory")


def test_replicas_add_up() -> None:
    cluster = parse_cluster("4xh100-sxm")
    one, four = (predict(LLAMA, cluster, LOAD, split_of(dp=dp)) for dp in (1, 4))
    assert four.output_tokens_per_s.value == pytest.approx(4 * one.output_tokens_per_s.value)
    assert four.tpot_s == one.tpot_s


def test_what_is_not_in_flight_is_not_served() -> None:
    cluster = parse_cluster("4xh100-sxm")
    few = LOAD.model_copy(update={"concurrency": 2})
    made = predict(LLAMA, cluster, few, split_of(dp=4, batch=8))
    assert made.batch_size == 1
    alone = predict(LLAMA, cluster, LOAD, split_of(dp=1, batch=1))
    assert made.output_tokens_per_s.value == pytest.approx(2 * alone.output_tokens_per_s.value)


def test_no_more_is_served_than_arrives() -> None:
    slow = LOAD.model_copy(update={"request_rate": 0.5})
    made = predict(LLAMA, parse_cluster("1xh100-sxm"), slow, split_of(batch=64))
    assert made.output_tokens_per_s.value == pytest.approx(0.5 * 128)
    fast = LOAD.model_copy(update={"request_rate": 5000.0})
    with pytest.raises(ValueError, match="fewer than the 5000 that arrive"):
        predict(LLAMA, parse_cluster("1xh100-sxm"), fast, split_of(batch=64))


def test_engines_differ() -> None:
    cluster = parse_cluster("8xh100-sxm")
    times = {
        engine: predict(LLAMA, cluster, LOAD, split_of(tp=8), engine).tpot_s.value
        for engine in ("rankwright", "vllm", "sglang", "trtllm")
    }
    assert len(set(times.values())) == len(times)
    assert max(times.values()) < 1.5 * min(times.values())


def test_memory_is_of_the_fullest_rank() -> None:
    made = predict(LLAMA, parse_cluster("2xh100-sxm"), LOAD, split_of(pp=2, batch=8))
    parts = {part.name: part.bytes for part in made.memory_parts}
    # 16 of 32 layers and one table of 128,256 x 4,096, in 2 bytes.
    layer = 2 * (4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096)
    assert parts["weights"] == pytest.approx(16 * layer + 2 * 128256 * 4096, rel=1e-4)
    assert parts["kv cache"] == 8 * (1024 + 128) * 16 * 2 * 8 * 128 * 2
    assert made.memory_bytes_per_gpu.value == sum(parts.values())


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (split_of(tp=33), "tp=33 leaves ranks without any of the 32 query heads"),
        (Split(tp=2, ep=2, stage_layers=(32,)), "the model has no experts"),
        (Split(stage_layers=(31,)), r"stage_layers \(31,\) sum to 31"),
        (split_of(tp=8, dp=2), "has room for 1 such groups, 2 needed"),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_one_line(split: Split, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        predict(LLAMA, parse_cluster("8xh100-sxm"), LOAD, split)
    assert "\n" not in str(caught.value)


def faster(cluster: Cluster, factor: float) -> Cluster:
    nodes = tuple(
        node.model_copy(
            update={
                "links": tuple(
                    link.model_copy(update={"bytes_per_s": link.bytes_per_s * factor})
                    for link in node.links
                )
            }
        )
        for node in cluster.nodes
    )
    fabric = cluster.fabric
    if fabric is not None:
        fabric = fabric.model_copy(update={"bytes_per_s": fabric.bytes_per_s * factor})
    return cluster.model_copy(update={"nodes": nodes, "fabric": fabric})


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([LLAMA, read_model("Qwen/Qwen3-30B-A3B")]),
    st.sampled_from([(8, 1), (2, 4), (4, 2), (16, 1), (1, 4)]),
    st.integers(1, 64),
    st.floats(1, 8),
)
def test_more_bandwidth_is_never_slower(
    model: ModelSpec, shape: tuple[int, int], batch: int, factor: float
) -> None:
    tp, pp = shape
    if model.layers[0].attention.num_kv_heads == 4 and tp == 16:
        tp = 8
    layers = tuple(model.num_layers // pp for _ in range(pp))
    split = Split(tp=tp, pp=pp, stage_layers=layers, max_batch_size=batch)
    cluster = parse_cluster("2x8xh100-sxm+ib400")
    slow = predict(model, cluster, LOAD, split)
    fast = predict(model, faster(cluster, factor), LOAD, split)
    assert fast.tpot_s.value <= slow.tpot_s.value
    assert fast.ttft_s.value <= slow.ttft_s.value
    assert fast.output_tokens_per_s.value >= slow.output_tokens_per_s.value


def test_a_mixed_cluster_serves_at_the_pace_of_each_kind() -> None:
    cluster = parse_cluster("1xh100-sxm+1xa100-sxm")
    both = predict(LLAMA, cluster, LOAD, split_of(dp=2))
    alone = [
        predict(LLAMA, parse_cluster(f"1x{gpu}"), LOAD, split_of())
        for gpu in ("h100-sxm", "a100-sxm")
    ]
    total = sum(one.output_tokens_per_s.value for one in alone)
    assert both.output_tokens_per_s.value == pytest.approx(total)
    assert both.tpot_s.value == max(one.tpot_s.value for one in alone)
