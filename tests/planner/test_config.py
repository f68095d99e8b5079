import pytest
from pydantic import ValidationError

from rankwright.planner.config import AutoParallelConfig
from rankwright.planner.make_plan import NoFeasiblePlanError
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.shorthand import parse_cluster

GB = 10**9


def test_the_four_names_of_tensorrt_llm_make_a_plan() -> None:
    config = AutoParallelConfig(
        world_size=8,
        gpus_per_node=4,
        memory_budget_per_device=24,
        enable_pipeline_parallelism=True,
        gpu="h100-sxm",
    )
    plan = config.plan()
    assert plan.model.name == "meta-llama/Llama-3.1-8B"
    assert plan.cluster.describe() == "2 x (4 x h100-sxm) + infiniband 4 x 400 Gb/s"
    assert plan.prediction.memory_bytes_per_gpu.value <= 24 * GB
    assert plan.assumptions == ()


def test_what_was_not_said_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(text: str) -> None:
        monkeypatch.setattr("rankwright.planner.config.probe", lambda: parse_cluster(text))

    machine("4xcpu")
    plan = AutoParallelConfig(world_size=2).plan()
    assert plan.cluster.describe() == "2 x h100-sxm"
    assert plan.assumptions == ("GPU: h100-sxm, since none was named and this machine has no GPU",)
    machine("2xl40s")
    config = AutoParallelConfig(world_size=2)
    assert config.cluster().describe() == "2 x l40s"
    assert config.plan().assumptions == ("GPU: l40s, as in this machine",)
    machine("1xl40s+1xl4")
    (assumed,) = AutoParallelConfig(world_size=2).plan().assumptions
    assert assumed.endswith("this machine has several kinds (l4, l40s)")


def test_a_broken_driver_does_not_stop_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Cluster:
        raise ProbeError("driver", "the driver does not answer; reboot")

    monkeypatch.setattr("rankwright.planner.config.probe", broken)
    (assumed,) = AutoParallelConfig(world_size=1).plan().assumptions
    assert assumed.startswith("GPU: h100-sxm, since this machine's cannot be read (the driver")


def test_fewer_gpus_than_a_node_has_are_one_node() -> None:
    config = AutoParallelConfig(world_size=6, gpus_per_node=8, gpu="h100")
    assert config.cluster().describe() == "6 x h100-sxm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"world_size": 6, "gpus_per_node": 4}, "no multiple of gpus_per_node=4; use 4 or 8 GPUs"),
        ({"world_size": 0}, "greater than or equal to 1"),
        ({"world_size": 8, "memory_budget_per_device": 0}, "greater than 0"),
        ({"world_size": 8, "gpu": "h1000"}, "unknown device 'h1000'; the nearest known are h100"),
        ({"world_size": 8, "word_size": 8}, "Extra inputs are not permitted"),
    ],
)
def test_unsound_sizes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AutoParallelConfig.model_validate(fields)


def test_an_unknown_interconnect_is_refused() -> None:
    config = AutoParallelConfig(world_size=16, gpu="h100-sxm", interconnect="token-ring")
    with pytest.raises(ValueError, match="token-ring"):
        config.cluster()


def test_the_pipeline_switch_and_the_budget_reach_the_planner() -> None:
    sizes = AutoParallelConfig(
        world_size=2,
        memory_budget_per_device=14,
        gpu="h100-sxm",
        model="Qwen/Qwen3-8B",
        tp=1,
    )
    assert sizes.plan().split.pp == 2
    with pytest.raises(NoFeasiblePlanError, match="allow pipeline parallelism"):
        sizes.model_copy(update={"enable_pipeline_parallelism": False}).plan()


def test_limits_reach_the_workload() -> None:
    config = AutoParallelConfig(
        world_size=1, gpu="h100-sxm", tpot_limit_s=0.02, concurrency=4, objective="latency"
    )
    load = config.workload()
    assert (load.tpot_limit_s, load.concurrency, load.objective) == (0.02, 4, "latency")
