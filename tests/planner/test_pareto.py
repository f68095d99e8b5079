from hypothesis import given
from hypothesis import strategies as st

from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.pareto_svg import pareto_svg
from rankwright.planner.make_plan import make_plan
from rankwright.planner.pareto import front_of
from rankwright.planner.plan import ParetoPoint, Plan
from rankwright.topology.shorthand import parse_cluster


def point(user: float, gpu: float) -> ParetoPoint:
    return ParetoPoint(
        label="TP1",
        num_gpus=1,
        batch_size=1,
        tokens_per_s_per_user=user,
        tokens_per_s_per_gpu=gpu,
        ttft_s=0.1,
    )


def beats(one: ParetoPoint, other: ParetoPoint) -> bool:
    mine = (one.tokens_per_s_per_user, one.tokens_per_s_per_gpu)
    theirs = (other.tokens_per_s_per_user, other.tokens_per_s_per_gpu)
    return mine != theirs and mine[0] >= theirs[0] and mine[1] >= theirs[1]


FIGURES = st.integers(1, 6).map(float)


@given(st.lists(st.builds(point, FIGURES, FIGURES), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[ParetoPoint]) -> None:
    front = front_of(points)
    left = [one for one in points if not any(beats(other, one) for other in points)]
    assert set(front) == set(left)
    assert len(set(front)) == len(front)


def test_a_plan_has_the_front_when_asked() -> None:
    load = Workload(input_tokens=1000, output_tokens=200, concurrency=16, tpot_limit_s=0.02)
    cluster = parse_cluster("8xh100-sxm")
    plan = make_plan(read_model("meta-llama/Llama-3.1-70B"), cluster, load, pareto=True)
    assert make_plan(plan.model, cluster, load).pareto == ()
    users = [one.tokens_per_s_per_user for one in plan.pareto]
    gpus = [one.tokens_per_s_per_gpu for one in plan.pareto]
    assert users == sorted(users, reverse=True)
    assert gpus == sorted(gpus)
    assert plan.pareto[0].batch_size == 1
    assert plan.pareto[-1].batch_size > 100  # beyond the concurrency of the plan
    # What was chosen is on the front, or behind a point of it.
    mine = point(
        1 / plan.prediction.tpot_s.value,
        plan.prediction.output_tokens_per_s.value / plan.num_gpus,
    )
    assert any(
        one.tokens_per_s_per_user >= mine.tokens_per_s_per_user * (1 - 1e-9)
        and one.tokens_per_s_per_gpu >= mine.tokens_per_s_per_gpu * (1 - 1e-9)
        for one in plan.pareto
    )
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    picture = pareto_svg(plan.pareto)
    assert picture.count("<circle") == len(plan.pareto)
    assert "TP8" in picture
