"""Attention DP and context parallelism in the search, as if some engine ran every form."""

import pytest

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import predict
from rankwright.cost_model.prediction import Prediction
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import CpExchange, Split
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import NoFeasiblePlanError, Pins, make_plan
from rankwright.planner.shapes import find_shapes
from rankwright.topology.cluster import Cluster
from rankwright.topology.shorthand import parse_cluster


def first_layers(model: ModelSpec, num_moe: int) -> ModelSpec:
    dense, moe = model.layer_runs
    return model.model_copy(
        update={"layer_runs": (dense, moe.model_copy(update={"count": num_moe}))}
    )


LLAMA_8B = read_model("meta-llama/Llama-3.1-8B")
# Its first 39 layers: as the executor holds them, in bfloat16, all 61 do not fit on eight H200.
DEEPSEEK_V3 = first_layers(read_model("deepseek-ai/DeepSeek-V3"), 36)
EIGHT = parse_cluster("8xh200-sxm")


def predicted(model: ModelSpec, load: Workload, **degrees: object) -> Prediction:
    split = Split(stage_layers=(model.num_layers,), **degrees)  # type: ignore[arg-type]
    return predict(model, EIGHT, load, split)


def part_of(prediction: Prediction, name: str) -> float:
    return sum(part.bytes for part in prediction.memory_parts if part.name == name)


def test_context_parallelism_shares_the_cache_and_long_prompts_out() -> None:
    long = Workload(input_tokens=100_000, output_tokens=100)
    alone = predicted(LLAMA_8B, long)
    shared = predicted(LLAMA_8B, long, cp=4)
    assert part_of(shared, "kv cache") == pytest.approx(part_of(alone, "kv cache") / 4, rel=1e-3)
    assert part_of(shared, "weights") == part_of(alone, "weights")
    assert 2.5 < alone.ttft_s.value / shared.ttft_s.value < 4
    # Weights are read by every rank, only the cache is shared: decoding gains less.
    assert 1 < alone.tpot_s.value / shared.tpot_s.value < 4
    short = Workload(input_tokens=100, output_tokens=100)
    assert predicted(LLAMA_8B, short, cp=4).tpot_s.value > predicted(LLAMA_8B, short).tpot_s.value


def test_attention_dp_keeps_the_latent_cache_once() -> None:
    load = Workload(input_tokens=4000, output_tokens=500)
    by_heads = predicted(DEEPSEEK_V3, load, tp=8, ep=8, max_batch_size=64)
    by_requests = predicted(DEEPSEEK_V3, load, tp=8, ep=8, max_batch_size=64, attention="dp")
    # MLA's cache is whole on every rank of TP.
    assert part_of(by_requests, "kv cache") == part_of(by_heads, "kv cache") / 8
    assert part_of(by_requests, "weights") > part_of(by_heads, "weights")
    # One request is on one rank, which then does all of its attention.
    lone = {"tp": 8, "ep": 8, "max_batch_size": 1}
    waiting = predicted(DEEPSEEK_V3, load, **lone, attention="dp").tpot_s.value
    assert waiting > predicted(DEEPSEEK_V3, load, **lone).tpot_s.value


def test_the_search_covers_every_product() -> None:
    model = read_model("Qwen/Qwen3-30B-A3B")
    shapes = find_shapes(model, EIGHT).legal
    found = {shape.degrees for shape in shapes}
    assert (2, 2, 2, 2, "dp", "gather") in found
    assert (4, 1, 2, 2, "tp", "gather") in found
    assert (3, 1, 3, 1, "dp", "gather") in found
    assert all(shape.num_gpus <= 8 for shape in shapes)
    assert len(found) == len(shapes)


def test_a_ring_hides_the_exchange_of_long_prompts_behind_attention() -> None:
    long = Workload(input_tokens=100_000, output_tokens=100)
    gathered, ring = (
        predicted(LLAMA_8B, long, cp=4, chunk_tokens=16384, cp_exchange=way)
        for way in ("gather", "ring")
    )
    assert ring.ttft_s.value < gathered.ttft_s.value
    assert part_of(ring, "activations") < part_of(gathered, "activations")
    names = [{part.name for part in one.prefill_parts} for one in (gathered, ring)]
    assert "context exchange" in names[0]
    assert "context ring" in names[1]
    # Tokens that decode gather what they found either way.
    assert ring.decode_parts == gathered.decode_parts
    # Latents are so few bytes that a launch for each part costs more than it hides.
    chunk = {"tp": 2, "cp": 4, "chunk_tokens": 16384}
    assert (
        predicted(DEEPSEEK_V3, long, **chunk, cp_exchange="ring").ttft_s.value
        > predicted(DEEPSEEK_V3, long, **chunk).ttft_s.value
    )


def test_the_cheaper_exchange_is_chosen_and_said() -> None:
    long = Workload(input_tokens=60_000, output_tokens=50, objective="latency")
    (node,) = parse_cluster("4xcpu").nodes
    room = {"memory_bytes": 10**12, "total_memory_bytes": 10**12}
    gpus = tuple(gpu.model_copy(update=room) for gpu in node.gpus)
    cluster = Cluster(nodes=(node.model_copy(update={"gpus": gpus}),))
    ways: tuple[CpExchange | None, ...] = (None, "gather", "ring")
    plans = {
        way: make_plan(LLAMA_8B, cluster, long, pins=Pins(tp=1, pp=1, dp=1, cp=4, cp_exchange=way))
        for way in ways
    }
    free = plans[None]
    best = min(plans.values(), key=lambda plan: plan.certificate.objective_value)
    assert free.certificate.objective_value == best.certificate.objective_value
    assert free.split.cp_exchange == "ring"
    assert "go round the context ranks" in free.explain()
    assert "are gathered from the context ranks" in plans["gather"].explain()
    other = next(one for one in free.certificate.runners_up if one.split.cp_exchange == "gather")
    assert "on context exchange" in other.reason


def test_what_has_run_on_cpus_alone_is_planned_on_gpus_where_pinned() -> None:
    for model in (LLAMA_8B, DEEPSEEK_V3):
        found = find_shapes(model, EIGHT).legal
        assert {shape.cp_exchange for shape in found} == {"gather"}
        assert any(shape.cp > 1 for shape in found) == (model is LLAMA_8B)
        pins = Pins(cp=2, cp_exchange="ring")
        pinned = find_shapes(model, EIGHT, pins=pins).legal
        assert {(shape.cp, shape.cp_exchange) for shape in pinned} == {(2, "ring")}
    with pytest.raises(ValueError, match="a ring takes cp=2 or more"):
        Pins(cp=1, cp_exchange="ring")
    with pytest.raises(ValueError, match="needs ranks to go round"):
        Split(stage_layers=(2,), cp_exchange="ring")


def test_attention_dp_is_planned_where_pinned() -> None:
    load = Workload(input_tokens=2000, output_tokens=200)
    plan = make_plan(DEEPSEEK_V3, EIGHT, load, pins=Pins(tp=8, attention="dp"))
    assert plan.split.attention == "dp"
    assert "attnDP" in plan.split.label()
    heads = make_plan(DEEPSEEK_V3, EIGHT, load, pins=Pins(tp=8, attention="tp"))
    assert plan.limits.max_num_seqs > heads.limits.max_num_seqs
    again = predict(DEEPSEEK_V3, EIGHT, load, plan.split)
    assert plan.prediction.output_tokens_per_s == again.output_tokens_per_s


@pytest.mark.parametrize(
    ("pins", "reason"),
    [
        (Pins(cp=2), "cp=2: vllm does not run context parallelism"),
        (Pins(attention="dp"), "vllm runs attention DP for models with experts only"),
        (Pins(tp=3), "tp=3 does not divide the 32 query heads"),
    ],
)
def test_a_form_that_the_engine_lacks_is_named(pins: Pins, reason: str) -> None:
    with pytest.raises(NoFeasiblePlanError) as caught:
        make_plan(LLAMA_8B, EIGHT, Workload(), pins=pins, engine="vllm")
    assert reason in caught.value.constraint


def test_a_plan_for_another_engine_says_so() -> None:
    plan = make_plan(DEEPSEEK_V3, EIGHT, Workload(), engine="sglang", pins=Pins(attention="dp"))
    assert plan.prediction.engine == "sglang"
    (assumption,) = plan.assumptions
    assert assumption.startswith("engine: planned for sglang")
