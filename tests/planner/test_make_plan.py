from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.cost_model.layout import find_slots
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import Replicas, predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import NoFeasiblePlanError, Pins, make_plan
from rankwright.planner.placement import place_ranks
from rankwright.planner.plan import Plan
from rankwright.planner.plan_shares import gpu_of, memory_of
from rankwright.topology.shorthand import parse_cluster

GB = 10**9
LLAMA_8B = read_model("meta-llama/Llama-3.1-8B")
LLAMA_70B = read_model("meta-llama/Llama-3.1-70B")
LLAMA_405B = read_model("meta-llama/Llama-3.1-405B")
SMOLLM2 = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
SHORT = Workload(input_tokens=1000, output_tokens=100)


def plan_of(model: ModelSpec, cluster: str, load: Workload = SHORT, **options: object) -> Plan:
    return make_plan(model, parse_cluster(cluster), load, **options)  # type: ignore[arg-type]


def check(plan: Plan, budget_bytes: float | None = None) -> None:
    """What holds for every plan: memory, numbering, and that the parts agree."""
    for rank in plan.ranks:
        used = sum(part.bytes for part in memory_of(plan, rank))
        limit = gpu_of(plan, rank).memory_bytes
        assert used <= min(limit, budget_bytes or limit)
    tokens = plan.workload.input_tokens + plan.workload.output_tokens
    assert plan.kv_cache.num_tokens >= tokens
    assert plan.limits.max_model_len >= tokens
    # A pipeline decodes a share of its sequences in each step.
    in_step = -(-plan.limits.max_num_seqs // plan.split.micro_batches)
    assert plan.limits.max_batched_tokens > in_step
    assert plan.certificate.gap <= 1e-6
    limits = plan.workload
    if limits.tpot_limit_s is not None:
        assert plan.prediction.tpot_s.value <= limits.tpot_limit_s
    if limits.ttft_limit_s is not None:
        assert plan.prediction.ttft_s.value <= limits.ttft_limit_s


def test_a_model_that_fits_one_gpu_is_replicated() -> None:
    plan = plan_of(LLAMA_8B, "8xh100-sxm")
    check(plan)
    assert (plan.split.dp, plan.num_gpus) == (8, 8)
    assert len({(rank.node, rank.gpu) for rank in plan.ranks}) == 8


def test_405b_in_bf16_takes_two_nodes_with_a_pipeline() -> None:
    plan = plan_of(LLAMA_405B, "2x8xh100-sxm+ib400", Workload(input_tokens=5000, output_tokens=100))
    check(plan)
    assert plan.split.pp >= 2
    assert plan.num_gpus == 16
    assert sum(plan.split.stage_layers) == 126


def test_70b_uses_all_of_six_gpus() -> None:
    load = Workload(input_tokens=5000, output_tokens=60, tpot_limit_s=0.060)
    plan = plan_of(LLAMA_70B, "6xh100-sxm", load)
    check(plan)
    assert plan.num_gpus == 6


def test_deepseek_v3_takes_both_nodes() -> None:
    model = read_model("deepseek-ai/DeepSeek-V3")
    plan = plan_of(model, "2x8xh200-sxm+ib400", Workload(input_tokens=2000, output_tokens=500))
    check(plan)
    assert plan.num_gpus == 16


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_smollm2_runs_on_any_number_of_cpu_ranks(ranks: int) -> None:
    plan = plan_of(SMOLLM2, f"{ranks}xcpu")
    check(plan)
    assert plan.num_gpus == ranks
    assert plan.kv_cache.block_tokens == 16
    # Of 4 GiB a rank, what the requests need and no more.
    assert plan.prediction.memory_bytes_per_gpu.value < 3.5 * GB


def test_cpu_ranks_have_room_for_a_conversation_beside_short_requests() -> None:
    load = Workload(input_tokens=16, output_tokens=16, concurrency=1)
    assert plan_of(SMOLLM2, "1xcpu", load).kv_cache.num_tokens == 8192


@pytest.mark.parametrize(
    ("pins", "cluster"),
    [
        (Pins(tp=3), "3xcpu"),
        (Pins(tp=2), "2xcpu"),
        (Pins(tp=5, pp=2), "10xcpu"),
        (Pins(pp=2), "2xcpu"),
        (Pins(tp=3, pp=2), "6xcpu"),
        (Pins(dp=2), "6xcpu"),
        (Pins(tp=9), "9xcpu"),
        (Pins(pp=7), "7xcpu"),
    ],
)
def test_pins_are_kept(pins: Pins, cluster: str) -> None:
    plan = plan_of(SMOLLM2, cluster, pins=pins)
    check(plan)
    for name in ("tp", "pp", "ep", "dp"):
        pinned = getattr(pins, name)
        assert pinned is None or getattr(plan.split, name) == pinned


def test_stages_balance_the_head_against_layers() -> None:
    # The head of the 1B model, 128,256 x 2,048, weighs as much as four of its layers.
    load = Workload(input_tokens=10, output_tokens=1000, concurrency=2)
    model = read_model("meta-llama/Llama-3.2-1B")
    plan = plan_of(model, "2xh100-sxm", load, pins=Pins(pp=2))
    first, last = plan.split.stage_layers
    assert first - last >= 4


def test_ranks_count_tp_first_then_stages_then_replicas() -> None:
    plan = plan_of(LLAMA_8B, "2x4xh100-sxm+ib400", pins=Pins(tp=2, pp=2, dp=2))
    order = [(rank.replica, rank.stage, rank.tp_rank) for rank in plan.ranks]
    assert order == sorted(order)
    for replica in range(2):
        # A replica of four GPUs stays on one node of four.
        assert len({rank.node for rank in plan.ranks if rank.replica == replica}) == 1


def test_ranks_hold_the_whole_model_once() -> None:
    plan = plan_of(SMOLLM2, "6xcpu", pins=Pins(tp=3, pp=2))
    heads = [rank.query_heads for rank in plan.ranks if rank.stage == 0]
    assert heads == [(0, 3), (3, 6), (6, 9)]
    assert [rank.kv_heads for rank in plan.ranks if rank.stage == 1] == [(0, 1), (1, 2), (2, 3)]
    vocab = [rank.vocab for rank in plan.ranks if rank.stage == 0]
    assert vocab[0][0] == 0
    assert vocab[-1][1] == SMOLLM2.vocab_size
    assert all(a[1] == b[0] for a, b in pairwise(vocab))
    assert plan.ranks[0].layers[1] == plan.ranks[3].layers[0]


def test_experts_are_shared_out() -> None:
    model = read_model("mistralai/Mixtral-8x7B-v0.1")
    plan = plan_of(model, "4xh100-sxm", pins=Pins(tp=4, ep=2))
    assert [rank.experts for rank in plan.ranks] == [(0, 4), (0, 4), (4, 8), (4, 8)]
    assert [rank.ffn_columns for rank in plan.ranks] == [(0, 7168), (7168, 14336)] * 2


def test_a_plan_predicts_what_predict_does() -> None:
    load = Workload(input_tokens=1000, output_tokens=100, concurrency=64)
    plan = plan_of(LLAMA_8B, "4xh100-sxm", load)
    again = predict(plan.model, plan.cluster, load, plan.split)
    assert plan.prediction.tpot_s == again.tpot_s
    assert plan.prediction.output_tokens_per_s == again.output_tokens_per_s
    assert plan.certificate.objective_value == pytest.approx(again.output_tokens_per_s.value)


def test_latency_takes_more_gpus_for_one_request() -> None:
    load = Workload(input_tokens=1000, output_tokens=100, objective="latency")
    plan = plan_of(LLAMA_70B, "8xh100-sxm", load)
    assert plan.split.tp == 8
    assert plan.limits.max_num_seqs == 1
    seconds = plan.prediction.ttft_s.value + 99 * plan.prediction.tpot_s.value
    assert plan.certificate.objective_value == pytest.approx(seconds)


def test_latency_holds_all_requests_in_flight() -> None:
    load = Workload(input_tokens=1000, output_tokens=100, objective="latency", concurrency=48)
    plan = plan_of(LLAMA_8B, "8xh100-sxm", load)
    assert plan.limits.max_num_seqs * plan.split.dp >= 48


def test_a_request_rate_is_met() -> None:
    load = Workload(input_tokens=1000, output_tokens=100, request_rate=4.0, objective="cost")
    plan = plan_of(LLAMA_8B, "8xh100-sxm", load)
    check(plan)
    assert plan.prediction.output_tokens_per_s.value == pytest.approx(400)
    assert plan.num_gpus == 1
    busy = plan_of(LLAMA_8B, "8xh100-sxm", load.model_copy(update={"request_rate": 100.0}))
    assert busy.num_gpus > 1


def test_a_tight_tpot_costs_throughput() -> None:
    loose = plan_of(LLAMA_70B, "8xh100-sxm", SHORT)
    tight = plan_of(LLAMA_70B, "8xh100-sxm", SHORT.model_copy(update={"tpot_limit_s": 0.03}))
    check(tight)
    assert tight.certificate.objective_value < loose.certificate.objective_value
    assert tight.certificate.binding_constraint.startswith("TPOT limit of 30 ms: ")


def test_the_concurrency_binds_when_there_are_too_few_requests() -> None:
    plan = plan_of(LLAMA_70B, "8xh100-sxm", SHORT.model_copy(update={"concurrency": 4}))
    assert plan.certificate.binding_constraint.startswith("concurrency of 4: with 8 requests")


def test_each_rank_of_attention_dp_has_a_batch_limit_of_its_own() -> None:
    load = Workload(input_tokens=1000, output_tokens=200)
    cluster = parse_cluster("2x8xh200-sxm+ib400")
    pins = Pins(tp=4, pp=4, attention="dp")
    plan = make_plan(read_model("deepseek-ai/DeepSeek-V3"), cluster, load, pins=pins)
    assert 1024 < plan.limits.max_num_seqs <= 4 * 1024
    pins = Pins(tp=4, pp=4, attention="tp")
    plan = make_plan(read_model("deepseek-ai/DeepSeek-V3"), cluster, load, pins=pins)
    assert plan.limits.max_num_seqs <= 1024


def test_more_slots_than_the_largest_step_leave_room_for_prompts() -> None:
    model, cluster = read_model("deepseek-ai/DeepSeek-V3"), parse_cluster("8xb300-sxm")
    pins = Pins(tp=8, attention="dp")
    load = Workload(input_tokens=100, output_tokens=100, concurrency=8190)
    plan = make_plan(model, cluster, load, pins=pins, engine="vllm")
    assert plan.limits.max_num_seqs == 8190
    assert plan.limits.max_batched_tokens == 2 * 8190


def test_the_batch_limit_of_cpus_is_what_binds_there() -> None:
    load = Workload(input_tokens=20, output_tokens=20)
    plan = make_plan(read_model("Qwen/Qwen2.5-0.5B"), parse_cluster("2xcpu"), load)
    assert plan.limits.max_num_seqs == 32
    assert plan.certificate.binding_constraint.startswith("batch limit of 32 sequences")


def test_runners_up_are_other_shapes_with_reasons() -> None:
    plan = plan_of(LLAMA_70B, "8xh100-sxm", top=4)
    labels = [one.split.label() for one in plan.certificate.runners_up]
    assert len(set(labels)) == len(labels) == 4
    assert plan.split.label() not in labels
    for one in plan.certificate.runners_up:
        assert one.objective_value <= plan.certificate.objective_value * (1 + 1e-6)
        assert any(letter.isdigit() for letter in one.reason)


def test_no_pipeline_when_none_is_allowed() -> None:
    plan = plan_of(LLAMA_70B, "8xh100-sxm", allow_pipeline=False)
    assert plan.split.pp == 1
    assert all(one.split.pp == 1 for one in plan.certificate.runners_up)


def test_a_mixed_node_gives_the_smaller_gpu_fewer_layers() -> None:
    model = read_model("Qwen/Qwen3-14B")
    plan = plan_of(model, "1xa100-pcie-40gb+1xl4", pins=Pins(pp=2))
    check(plan)
    assert plan.split.stage_layers[0] > 2 * plan.split.stage_layers[1]


def test_sixteen_thousand_gpus_are_planned() -> None:
    plan = plan_of(LLAMA_8B, "2048x8xh100-sxm+ib400", pins=Pins(tp=1))
    assert plan.num_gpus == 16384
    assert plan.ranks[-1].node == 2047


# What does not fit.


def test_too_little_memory_names_the_bytes_and_what_would_fit() -> None:
    with pytest.raises(NoFeasiblePlanError) as caught:
        plan_of(LLAMA_405B, "8xh100-sxm")
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.constraint.startswith("memory: TP8 at batch 1 is the smallest and needs")
    assert caught.value.change.startswith("FP8 weights on an engine that computes with them")
    assert caught.value.change in message


def test_a_forbidden_pipeline_is_the_nearest_change() -> None:
    with pytest.raises(NoFeasiblePlanError) as caught:
        plan_of(LLAMA_70B, "6xh100-sxm", pins=Pins(tp=1), allow_pipeline=False)
    assert caught.value.change.startswith("allow pipeline parallelism")


@pytest.mark.parametrize(
    ("field", "value", "name"), [("tpot_limit_s", 0.002, "TPOT"), ("ttft_limit_s", 0.005, "TTFT")]
)
def test_the_suggested_limit_is_feasible(field: str, value: float, name: str) -> None:
    load = Workload(input_tokens=1000, output_tokens=100)
    with pytest.raises(NoFeasiblePlanError) as caught:
        plan_of(LLAMA_70B, "8xh100-sxm", load.model_copy(update={field: value}))
    assert caught.value.constraint.startswith(f"{name} limit of {value * 1e3:.4g} ms")
    words = caught.value.change.split()
    assert words[:4] == ["a", name, "limit", "of"]
    suggested = load.model_copy(update={field: float(words[4]) / 1e3})
    check(plan_of(LLAMA_70B, "8xh100-sxm", suggested))


def test_the_suggested_budget_is_feasible() -> None:
    with pytest.raises(NoFeasiblePlanError) as caught:
        plan_of(LLAMA_8B, "1xrtx4090", memory_budget_bytes=10 * GB)
    words = caught.value.change.split()
    assert words[:4] == ["a", "memory", "budget", "of"]
    check(plan_of(LLAMA_8B, "1xrtx4090", memory_budget_bytes=int(words[4]) * GB))


def test_a_rate_that_cannot_be_served_is_named() -> None:
    load = SHORT.model_copy(update={"request_rate": 10_000.0})
    with pytest.raises(NoFeasiblePlanError) as caught:
        plan_of(LLAMA_70B, "8xh100-sxm", load)
    assert caught.value.constraint.startswith("request rate: at most")
    rate = float(caught.value.change.split()[0])
    check(plan_of(LLAMA_70B, "8xh100-sxm", SHORT.model_copy(update={"request_rate": rate})))


def test_illegal_pins_say_why() -> None:
    heads = Pins(tp=10, attention="tp")
    with pytest.raises(NoFeasiblePlanError, match="tp=10 leaves ranks without any of the 9 query"):
        plan_of(SMOLLM2, "10xcpu", pins=heads)
    with pytest.raises(NoFeasiblePlanError, match=r"dp=3"):
        plan_of(SMOLLM2, "2xcpu", pins=Pins(dp=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget_bytes": -1}, "memory budget of -1 bytes: expected more than 0"),
        ({"memory_budget_bytes": 10**18}, "memory budget of 1e\\+09 GB a GPU: the largest GPU"),
        ({"top": 0}, "top=0: expected 1 or more"),
        ({"time_limit_s": float("nan")}, "time_limit_s=nan: expected more than 0, and finite"),
    ],
)
def test_unsound_input_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(SMOLLM2, "1xcpu", SHORT, **options)


def test_a_request_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the context of"):
        plan_of(SMOLLM2, "1xcpu", Workload(input_tokens=8000, output_tokens=1000))
    with pytest.raises(ValueError, match="tp=0 is pinned: expected 1 or more"):
        Pins(tp=0)


# Laws.

plans = st.tuples(
    st.sampled_from([SMOLLM2, LLAMA_8B, read_model("Qwen/Qwen3-30B-A3B")]),
    st.sampled_from(["1xh100-sxm", "3xrtx4090", "4xl40s", "2x2xa100-sxm+ib200", "2xl4+1xl40s"]),
    st.integers(1, 4000),
    st.integers(1, 500),
    st.sampled_from([None, 1, 7, 100]),
)


@settings(deadline=None, max_examples=25)
@given(plans, st.floats(1.0, 80.0))
def test_no_plan_exceeds_its_budget(
    case: tuple[ModelSpec, str, int, int, int | None], budget_gb: float
) -> None:
    model, cluster, isl, osl, concurrency = case
    load = Workload(input_tokens=isl, output_tokens=osl, concurrency=concurrency)
    machines = parse_cluster(cluster)
    most = max(gpu.total_memory_bytes for node in machines.nodes for gpu in node.gpus)
    budget = min(int(budget_gb * GB), most)
    try:
        plan = plan_of(model, cluster, load, memory_budget_bytes=budget)
    except NoFeasiblePlanError as error:
        binds = error.constraint.split(":")[0]
    else:
        binds = "memory"
        check(plan, budget)
        assert plan.prediction.memory_bytes_per_gpu.value <= budget
    assert binds == "memory"


@settings(deadline=None, max_examples=15)
@given(plans)
def test_a_plan_survives_json(case: tuple[ModelSpec, str, int, int, int | None]) -> None:
    model, cluster, isl, osl, concurrency = case
    load = Workload(input_tokens=isl, output_tokens=osl, concurrency=concurrency)
    try:
        plan = plan_of(model, cluster, load)
    except NoFeasiblePlanError:
        return
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1.0, 2.0, 5.0]), st.sampled_from(["4xa100-pcie", "2x2xl40s+eth25"]))
def test_faster_links_never_make_a_worse_plan(factor: float, name: str) -> None:
    cluster = parse_cluster(name)
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
    load = Workload(input_tokens=500, output_tokens=100, concurrency=16)
    slow = make_plan(LLAMA_70B if "a100" in name else LLAMA_8B, cluster, load)
    fast = make_plan(slow.model, cluster.model_copy(update={"nodes": nodes}), load)
    floor = slow.certificate.objective_value * (1 - 1e-6)
    assert fast.certificate.objective_value >= floor


def test_ranks_count_tp_then_cp_then_stages() -> None:
    cluster = parse_cluster("8xh100-sxm")
    split = Split(tp=2, cp=2, pp=2, stage_layers=(16, 16))
    kinds = find_slots(cluster, 4)
    ranks = place_ranks(LLAMA_8B, split, (Replicas(kinds * 2, 1),))
    order = [(rank.stage, rank.cp_rank, rank.tp_rank) for rank in ranks]
    assert order == sorted(order)
    assert len(set(order)) == 8
    # Ranks of a CP group hold the same weights.
    assert ranks[0].query_heads == ranks[2].query_heads != ranks[1].query_heads
    plan = plan_of(LLAMA_8B, "8xh100-sxm")
    wrong = tuple(rank.model_copy(update={"cp_rank": 1 - rank.cp_rank}) for rank in ranks)
    for found, matches in ((ranks, True), (wrong, False)):
        fields = plan.model_dump() | {"split": split, "ranks": found}
        if matches:
            Plan.model_validate(fields)
        else:
            with pytest.raises(ValueError, match=r"cp_rank 1, .* \+ cp_rank\) \* tp \+ tp_rank"):
                Plan.model_validate(fields)
