"""Unequal shares over unlike GPUs, in whole searches and plans."""

from dataclasses import replace
from typing import Any

import pytest
from tests.planner.exhaustive import exhaustive
from tests.planner.exhaustive_shares import few_units
from tests.planner.random_cases import Case, random_case

from rankwright.cost_model.layout import find_slots
from rankwright.cost_model.legality import shares_are_legal
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.unlike_stage import UnlikeStage
from rankwright.cost_model.workload import Workload
from rankwright.planner.explain import explain
from rankwright.planner.ilp import Choice
from rankwright.planner.make_plan import NoFeasiblePlanError, make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.plan_shares import gpu_of, has_unequal_shares, memory_of, shares_of
from rankwright.planner.search import Search
from rankwright.planner.shapes import Pins
from rankwright.topology.shorthand import parse_cluster

UNLIKE = ("1xl40s+1xl4", "1xa10+1xt4", "1xa100-pcie+1xl40s", "2xl40s+1xl4")
# Among these are dense and MoE models, one and two layers of units fewer than ranks, memory that
# decides (29, 36), each objective, limits, and equal shares that are best (11).
SEEDS = (5, 11, 14, 15, 20, 28, 29, 35, 36, 45)


def unlike_case(seed: int) -> Case:
    """Return a random problem on GPUs of two kinds, all of which form one TP group."""
    case = random_case(seed)
    cluster = parse_cluster(UNLIKE[seed % len(UNLIKE)])
    return replace(case, cluster=cluster, tp=cluster.num_gpus)


def chosen_shares(choice: Choice) -> list[Shares]:
    """Return the unequal shares of a choice."""
    kinds = [kind for group in choice.candidate.pool.replicas for kind in group.stages]
    return [kind.shares for kind in kinds if kind.shares is not None]


@pytest.mark.parametrize("seed", SEEDS)
def test_unequal_shares_are_as_good_as_the_best_of_all(seed: int) -> None:
    case = unlike_case(seed)
    with few_units():
        choice, best = case.search().best(settle=False), exhaustive(case)
    assert (choice is None) == (best is None)
    if choice is not None:
        assert choice.value == pytest.approx(best)
        assert bool(chosen_shares(choice)) == (seed != 11)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return a plan over a GPU of 600 GB/s and one of 320 GB/s."""
    load = Workload(input_tokens=1000, output_tokens=200, concurrency=8)
    return make_plan(read_model("meta-llama/Llama-3.1-8B"), parse_cluster("1xa10+1xt4"), load)


def test_a_plan_gives_the_faster_gpu_more_and_says_so(plan: Plan) -> None:
    fast, slow = plan.ranks
    assert (fast.query_heads, slow.query_heads) == ((0, 24), (24, 32))
    assert (fast.kv_heads, slow.kv_heads) == ((0, 6), (6, 8))
    assert fast.ffn_columns[1] == slow.ffn_columns[0]
    assert fast.vocab[1] == slow.vocab[0]
    assert (slow.ffn_columns[1], slow.vocab[1]) == (14336, 128256)
    shares = shares_of(plan, slow)
    assert shares is not None
    assert shares.query_heads == (24, 8)
    text = explain(plan)
    assert "each rank holds its share of 32 layers" in text
    assert "rank 1 (t4): 8 query and 2 KV heads" in text


def test_unequal_shares_serve_more_than_equal_ones(plan: Plan) -> None:
    value = plan.certificate.objective_value
    load, cluster = plan.workload, plan.cluster
    equal = make_plan(plan.model, cluster, load, pins=Pins(tp=2), engine="vllm")
    assert shares_of(equal, equal.ranks[0]) is None
    search = Search(plan.model, cluster, load, pins=Pins(tp=2))
    alike = [
        candidate
        for candidate in search.candidates
        if not candidate.broken and candidate.pool.replicas[0].stages[0].shares is None
    ]
    most = max(one.serving[0].requests_per_s for one in alike) * load.output_tokens
    assert value > 1.2 * most


def test_every_rank_of_a_plan_fits_its_own_gpu_and_none_is_much_slower() -> None:
    # 98 GB of weights: half of them do not fit on the L40S, of 48 GB.
    spec = read_model("Qwen/Qwen3-32B").model_copy(update={"dtype": "bfloat16"})
    spec = spec.model_copy(
        update={
            "layer_runs": tuple(
                run.model_copy(update={"count": run.count * 3 // 2}) for run in spec.layer_runs
            )
        }
    )
    cluster = parse_cluster("1xh200-sxm+1xl40s")
    load = Workload(input_tokens=500, output_tokens=100, concurrency=4)
    plan = make_plan(spec, cluster, load, pins=Pins(tp=2))
    for rank in plan.ranks:
        taken = sum(part.bytes for part in memory_of(plan, rank))
        assert taken <= 0.97 * gpu_of(plan, rank).memory_bytes
    with pytest.raises(NoFeasiblePlanError):
        make_plan(spec, cluster, load, pins=Pins(tp=2, pp=1), engine="vllm")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("meta-llama/Llama-3.1-8B", {"engine": "vllm"}, "vllm gives every rank"),
        ("meta-llama/Llama-3.1-8B", {"attention": "dp"}, "every rank has all heads"),
        ("meta-llama/Llama-3.1-8B", {"cp": 2}, "cp=2"),
        ("mistralai/Mixtral-8x7B-v0.1", {"ep": 2}, "ep=2"),
        ("deepseek-ai/DeepSeek-V3", {}, "layers of several sizes"),
        ("meta-llama/Llama-3.1-8B", {}, None),
        ("mistralai/Mixtral-8x7B-v0.1", {}, None),
        ("openai/gpt-oss-20b", {}, None),
    ],
)
def test_shares_are_equal_where_they_must(
    name: str, changes: dict[str, Any], reason: str | None
) -> None:
    found = shares_are_legal(read_model(name), **changes)
    assert (found is None) == (reason is None)
    assert found is None or (reason is not None and reason in found)


def test_attention_dp_on_unlike_gpus_keeps_equal_shares() -> None:
    load = Workload(input_tokens=200, output_tokens=50, concurrency=4)
    model = read_model("Qwen/Qwen3-30B-A3B")
    cluster = parse_cluster("1xh100-pcie+1xl40s")
    for pins in (Pins(tp=2, attention="dp"), Pins(tp=2, ep=2, attention="tp")):
        plan = make_plan(model, cluster, load, pins=pins)
        assert not has_unequal_shares(plan)


def test_engines_refuse_unequal_shares(plan: Plan) -> None:
    for target in ("vllm", "sglang", "trtllm"):
        with pytest.raises(ValueError, match="unequal shares of a TP group"):
            plan.render(target)


def test_shares_of_a_slot_of_equal_gpus_are_equal() -> None:
    cluster = parse_cluster("2xl40s")
    (node,) = cluster.nodes
    # What another process holds on one of them is no reason for other shares.
    gpus = [
        gpu.model_copy(update={"memory_bytes": gpu.memory_bytes - i * 10**9})
        for i, gpu in enumerate(node.gpus)
    ]
    cluster = cluster.model_copy(update={"nodes": (node.model_copy(update={"gpus": tuple(gpus)}),)})
    load = Workload(input_tokens=200, output_tokens=50, concurrency=4)
    plan = make_plan(read_model("meta-llama/Llama-3.1-8B"), cluster, load, pins=Pins(tp=2))
    assert not has_unequal_shares(plan)


def test_like_ranks_take_what_a_stage_of_like_gpus_takes() -> None:
    """A stage that times each rank equals one that times the fullest, where all are alike."""
    cluster = parse_cluster("2xl40s")
    models = StageModels(read_model("meta-llama/Llama-3.1-8B"), cluster, "rankwright")
    (kind,) = find_slots(cluster, 2)
    like = models.stage(kind, 1, "tp")
    unlike = models.stage(replace(kind, members=(kind.gpu,) * 2), 1, "tp")
    assert isinstance(unlike, UnlikeStage)
    for tokens in (StepTokens(8, 1000), StepTokens(8, 1000, 500, 250, 0.5)):
        assert unlike.layer_s(0, tokens) == pytest.approx(like.layer_s(0, tokens))
        assert unlike.last_s(tokens) == pytest.approx(like.last_s(tokens))
        ours = sum(part.seconds for part in unlike.layer_parts(0, tokens))
        assert ours == pytest.approx(sum(part.seconds for part in like.layer_parts(0, tokens)))
