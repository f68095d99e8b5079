import pytest

from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner.environment import find_environment
from rankwright.planner.explain import explain
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.topology.cluster import Cluster, Nic
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
LOAD = Workload(input_tokens=1000, output_tokens=100, tpot_limit_s=0.05)


def plan_on(cluster: Cluster, pins: Pins | None = None) -> Plan:
    return make_plan(LLAMA, cluster, LOAD, pins=pins, assumptions=("GPU: guessed",))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_on(parse_cluster("2x4xh100-sxm+ib400"), Pins(tp=2, pp=2))


def test_an_explanation_names_everything_that_decided(plan: Plan) -> None:
    text = explain(plan)
    assert text == plan.explain()
    for words in (
        "meta-llama/Llama-3.1-8B on 2 x (4 x h100-sxm)",
        "TP2 PP2 DP2, 8 of 8 GPUs",
        "time per output token",
        "limit 50",
        "Memory of the fullest rank",
        "kv cache",
        "One decode step of the slowest stage",
        "all-reduce",
        "bound by link",
        plan.certificate.binding_constraint,
        "gap 0",
        "HiGHS",
        "GPU: guessed",
    ):
        assert words in text, words


def test_runners_up_are_listed_with_their_reasons() -> None:
    plan = plan_on(parse_cluster("8xh100-sxm"))
    text = explain(plan)
    for one in plan.certificate.runners_up:
        assert f"{one.split.label()}: {one.reason}" in text


def test_times_add_up_to_what_is_printed(plan: Plan) -> None:
    total_ms = sum(part.seconds for part in plan.prediction.decode_parts) * 1e3
    assert f"One decode step of the slowest stage, {total_ms:.4g} ms:" in explain(plan)


def settings_of(plan: Plan) -> dict[str, str]:
    return {one.name: one.value for one in plan.environment}


def test_a_machine_with_nvlink_needs_no_settings() -> None:
    assert plan_on(parse_cluster("8xh100-sxm")).environment == ()


def test_cpu_ranks_share_the_cores() -> None:
    model = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    cluster = parse_cluster("2xcpu")
    node = cluster.nodes[0].model_copy(update={"num_cpus": 8})
    cluster = cluster.model_copy(update={"nodes": (node,)})
    plan = make_plan(model, cluster, Workload(input_tokens=10, output_tokens=10))
    assert settings_of(plan) == {"OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "lo"}


def test_ethernet_switches_verbs_off() -> None:
    plan = plan_on(parse_cluster("2x2xl40s+eth100"), Pins(tp=2, dp=2))
    assert settings_of(plan) == {"NCCL_IB_DISABLE": "1"}


def test_storage_ports_are_left_out_of_the_fabric() -> None:
    cluster = parse_cluster("2x2xh100-sxm+ib400")
    ports = tuple(Nic(name=f"mlx5_{index}", bytes_per_s=50e9, rdma=True) for index in range(2))
    storage = Nic(name="mlx5_9", bytes_per_s=12.5e9, rdma=True)
    node = cluster.nodes[0].model_copy(update={"nics": (*ports, storage)})
    plan = plan_on(cluster.model_copy(update={"nodes": (node,)}), Pins(tp=2, dp=2))
    assert settings_of(plan) == {"NCCL_IB_HCA": "=mlx5_0,mlx5_1"}
    (setting,) = plan.environment
    assert "mlx5_9" in setting.reason
    # Ranks on one node only do not use the fabric.
    assert find_environment(plan.cluster, plan.ranks[:2]) == ()
