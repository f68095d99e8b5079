import pytest

from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Objective, Workload
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.search import Search
from rankwright.planner.shapes import find_widths
from rankwright.topology.shorthand import parse_cluster


@pytest.mark.parametrize(
    ("cluster", "widths"),
    [
        ("6xh100-sxm", [1, 2, 3, 4, 5, 6]),
        ("2x8xh100-sxm+ib400", list(range(1, 17))),
        ("3x8xh100-sxm+ib400", [1, 2, 4, 8, 16, 24]),
        ("2048x8xh100-sxm+ib400", [1, 2, 4, 8, 16, 32, 64]),
        ("5x6xh100-sxm+ib400", [1, 2, 3, 4, 6, 12, 24, 30]),
    ],
)
def test_large_clusters_are_cut_where_no_gpu_is_left_over(cluster: str, widths: list[int]) -> None:
    assert find_widths(parse_cluster(cluster)) == widths


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B"])
@pytest.mark.parametrize("objective", ["throughput", "cost"])
@pytest.mark.parametrize("cluster", ["4xa100-pcie", "2xl40s+2xl4", "2x2xh100-sxm+ib400"])
def test_batches_that_are_not_looked_at_are_never_the_best(
    model: str, objective: Objective, cluster: str
) -> None:
    load = Workload(input_tokens=700, output_tokens=300, objective=objective)
    few = Search(read_model(model), parse_cluster(cluster), load)
    every = few.changed(every_level=True)
    assert len(few.candidates) < len(every.candidates)
    one, other = few.best(settle=False), every.best(settle=False)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.value == pytest.approx(other.value)


def test_racks_of_72_are_planned_as_one_machine_each() -> None:
    load = Workload(input_tokens=2000, output_tokens=500)
    racks = parse_cluster("4x72xgb200+ib400")
    assert 72 in find_widths(racks)
    model = read_model("meta-llama/Llama-3.1-405B")
    plan = make_plan(model, racks, load, pins=Pins(tp=8))
    assert plan.num_gpus == 288
    # Nine replicas of 8, or fewer of several stages, fill a rack: none leaves it.
    for replica in range(plan.split.dp):
        assert len({rank.node for rank in plan.ranks if rank.replica == replica}) == 1
