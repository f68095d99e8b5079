"""Plans of unlike replicas: equal to trying everything, on disjoint GPUs, and only where better."""

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.planner.exhaustive_shares import few_units
from tests.planner.forced_parts import forced_parts
from tests.planner.random_parts import best_mix, random_parts_case

from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_parts import WORTHWHILE, best_parts, plan_parts, with_parts
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.part_bound import most_tokens_per_s
from rankwright.planner.part_program import PartsChoice
from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_any_plan, read_plan, write_plan
from rankwright.planner.search import Search
from rankwright.planner.twins import Twins
from rankwright.topology.cluster import Cluster, Link
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
CARDS = "2xrtx4090+2xrtx3090"
LOAD = Workload(tpot_limit_s=0.05)
# Three and four parts (4, 8), a limit on requests in flight (10), one replica over all (5), no
# replica at all (2).
SEEDS = (2, 4, 5, 8, 10)


def choice_of(seed: int) -> PartsChoice | None:
    case = random_parts_case(seed)
    found = best_parts(case.search(), Twins(case.cluster.nodes[0]))
    return None if found is None else found[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mix_is_as_good_as_the_best_of_all(seed: int) -> None:
    with few_units():
        choice, best = choice_of(seed), best_mix(random_parts_case(seed))
    assert (choice is None) == (best == 0)
    if choice is not None:
        assert choice.value == pytest.approx(best)
        assert choice.ending.gap <= 1e-6


@pytest.mark.parametrize("seed", [4, 10])
def test_both_solvers_find_mixes_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    highs = choice_of(seed)
    monkeypatch.setattr("rankwright.planner.solver.find_spec", lambda name: None)
    cbc = choice_of(seed)
    assert highs is not None
    assert cbc is not None
    assert (highs.ending.solver.split()[0], cbc.ending.solver) == ("HiGHS", "CBC")
    assert highs.value == pytest.approx(cbc.value)


@pytest.mark.parametrize("seed", [1, 6, 10])
def test_a_mix_on_like_cards_serves_about_what_each_could(seed: int) -> None:
    choice, most = choice_of(seed), most_tokens_per_s(random_parts_case(seed).search())
    assert choice is not None
    assert most is not None
    assert 0.9 * most <= choice.value <= 1.01 * most


def test_of_unlike_cards_nothing_is_known_without_looking() -> None:
    assert most_tokens_per_s(Search(LLAMA, parse_cluster(CARDS), LOAD)) is None


KINDS = (
    Link(a=0, b=1, kind="NV4", bytes_per_s=1e11, latency_s=1e-6),
    Link(a=0, b=1, kind="SYS", bytes_per_s=1.6e10, latency_s=2e-6),
)


@given(st.lists(st.sampled_from((*KINDS, None)), min_size=6, max_size=6), st.data())
def test_sets_with_as_many_of_each_class_are_alike(
    joins: list[Link | None], data: st.DataObject
) -> None:
    (node,) = parse_cluster("4xa100-pcie").nodes
    links = tuple(
        kind.model_copy(update={"a": a.index, "b": b.index})
        for kind, (a, b) in zip(joins, combinations(node.gpus, 2), strict=True)
        if kind is not None
    )
    twins = Twins(node.model_copy(update={"links": links}))
    assert sorted(gpu for members in twins.classes for gpu in members) == [0, 1, 2, 3]
    counts = data.draw(st.sampled_from(sorted(twins.kinds())))
    other = tuple(
        gpu
        for members, count in zip(twins.classes, counts, strict=True)
        for gpu in data.draw(st.permutations(members))[:count]
    )
    assert twins.signature(twins.first(counts)) == twins.signature(other)


def test_pairs_under_nvlink_are_no_twins_of_the_rest() -> None:
    (node,) = parse_cluster("4xa100-pcie").nodes
    assert Twins(node).classes == ((0, 1, 2, 3),)
    bridged = tuple(
        link.model_copy(update={"kind": "NV4"}) if {link.a, link.b} == {1, 3} else link
        for link in node.links
    )
    twins = Twins(node.model_copy(update={"links": bridged}))
    assert twins.classes == ((0, 2), (1, 3))
    assert twins.num_kinds == len(list(twins.kinds())) == 8


@pytest.fixture(scope="module")
def mixed() -> PartsPlan:
    plan = plan_parts(LLAMA, parse_cluster(CARDS), LOAD, assumptions=("GPU: guessed",))
    assert isinstance(plan, PartsPlan)
    return plan


def test_each_card_gets_the_shape_that_suits_it(mixed: PartsPlan) -> None:
    assert mixed.label() == "2 x TP1 + TP2"
    assert [[rank.gpu for rank in part.ranks] for part in mixed.parts] == [[0, 1], [2, 3]]
    assert mixed.num_gpus == 4
    assert mixed.num_replicas == 3
    assert "unlike replicas serve" in mixed.alike.verdict
    alike = make_plan(LLAMA, parse_cluster(CARDS), LOAD)
    assert mixed.alike.objective_value == pytest.approx(alike.certificate.objective_value)
    gain = mixed.certificate.objective_value / mixed.alike.objective_value
    assert gain > 1 + WORTHWHILE


def test_the_parts_add_up_to_the_objective(mixed: PartsPlan) -> None:
    rates = [part.prediction.output_tokens_per_s.value for part in mixed.parts]
    assert sum(rates) == pytest.approx(mixed.certificate.objective_value)
    assert mixed.prediction.output_tokens_per_s.value == pytest.approx(sum(rates))
    assert sum(mixed.shares()) == pytest.approx(1)
    assert mixed.prediction.tpot_s.value <= 0.05
    assert all(part.prediction.tpot_s.value <= 0.05 for part in mixed.parts)


def test_requests_in_flight_are_shared_out() -> None:
    load = Workload(concurrency=32)
    plan = plan_parts(LLAMA, parse_cluster("3xl40s"), load)
    assert isinstance(plan, PartsPlan)
    shares = [part.workload.concurrency or 0 for part in plan.parts]
    assert shares == [part.limits.max_num_seqs * part.split.dp for part in plan.parts]
    assert sum(shares) <= 32
    assert plan.workload == load
    assert "concurrency of 32" in plan.certificate.binding_constraint


def test_alike_replicas_stay_where_no_mix_is_better() -> None:
    assert isinstance(plan_parts(LLAMA, parse_cluster("4xh100-sxm"), Workload()), Plan)


@pytest.mark.parametrize(
    "changes",
    [
        {"workload": LOAD.model_copy(update={"objective": "cost"})},
        {"workload": LOAD.model_copy(update={"request_rate": 1.0})},
        {"workload": LOAD.model_copy(update={"percentile": 90})},
        {"cluster": parse_cluster("1x2xrtx4090+1x2xrtx3090+eth100")},
        {"pins": Pins(tp=2)},
        {"engine": "vllm"},
    ],
)
def test_mixes_are_not_looked_for_beyond_their_cases(
    mixed: PartsPlan, changes: dict[str, object]
) -> None:
    search = Search(LLAMA, parse_cluster(CARDS), LOAD)
    slower = mixed.parts[0]
    slower = slower.model_copy(
        update={"certificate": slower.certificate.model_copy(update={"objective_value": 1.0})}
    )
    assert with_parts(search.changed(**changes), slower) is slower


def test_a_plan_of_parts_is_written_and_read_back(mixed: PartsPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(mixed, path)
    assert read_any_plan(path) == mixed
    with pytest.raises(ValueError, match=r"different shapes \(2 x TP1 \+ TP2\).*--mixed-shapes"):
        read_plan(path)


def test_parts_that_share_a_gpu_are_refused(mixed: PartsPlan) -> None:
    fields = mixed.model_dump()
    with pytest.raises(ValueError, match="GPU 0 is in part 0 and in part 1"):
        PartsPlan.model_validate({**fields, "parts": [fields["parts"][0]] * 2})
    with pytest.raises(ValueError, match="num_gpus is 3, the parts have 4"):
        PartsPlan.model_validate({**fields, "num_gpus": 3})
    renamed = mixed.parts[1].model_copy(
        update={"model": LLAMA.model_copy(update={"name": "another"})}
    )
    with pytest.raises(ValueError, match="one model on one cluster"):
        PartsPlan.model_validate({**fields, "parts": [fields["parts"][0], renamed]})


def test_cpu_ranks_of_all_parts_share_the_cores() -> None:
    (node,) = parse_cluster("3xcpu").nodes
    cluster = Cluster(nodes=(node.model_copy(update={"num_cpus": 12}),))
    model = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    load = Workload(concurrency=4, input_tokens=64, output_tokens=16)
    plan = forced_parts(model, cluster, load, (("TP2", 1), ("TP1", 1)))
    assert [[rank.gpu for rank in part.ranks] for part in plan.parts] == [[0, 1], [2]]
    for part in plan.parts:
        threads = {one.name: one.value for one in part.environment}["OMP_NUM_THREADS"]
        assert threads == "4"


def test_an_explanation_says_what_each_part_does_and_why(mixed: PartsPlan) -> None:
    text = mixed.explain()
    for words in (
        "2 x TP1 + TP2, 4 of 4 GPUs; 3 replicas behind one router",
        "Part 0, 2 x TP1 on rtx4090 0; rtx4090 1:",
        "Part 1, TP2 on rtx3090 2, 3:",
        "limit 50",
        "all-reduce",
        "gap 0",
        mixed.certificate.binding_constraint,
        mixed.alike.verdict,
        "GPU: guessed",
    ):
        assert words in text


def test_targets_that_start_one_shape_refuse_it(mixed: PartsPlan) -> None:
    with pytest.raises(
        ValueError, match=r"'vllm' starts one shape; render it for slurm or kubernetes"
    ):
        mixed.render("vllm")
