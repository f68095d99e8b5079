import json
from pathlib import Path

import pytest

from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import check_cluster, read_plan, write_plan
from rankwright.topology.shorthand import parse_cluster


@pytest.fixture(scope="module")
def plan() -> Plan:
    model = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    load = Workload(input_tokens=100, output_tokens=20)
    return make_plan(model, parse_cluster("2xcpu"), load, pins=Pins(pp=2))


def test_a_written_plan_is_read_back(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(plan, path)
    assert read_plan(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert path.stat().st_mode & 0o400


def test_a_plan_is_written_over_an_older_one(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    write_plan(plan, path)
    assert read_plan(path) == plan


def test_a_missing_folder_is_named(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written: No such file"):
        write_plan(plan, tmp_path / "none" / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gpus": 3}, "num_gpus is 3, the split PP2 takes 2"),
        ({"color": "red"}, "color: Extra inputs are not permitted"),
        ({"num_gpus": "many"}, r'num_gpus: .*integer.* \(got "many"\)'),
        ({"cluster_fingerprint": "0"}, "cluster_fingerprint is 0"),
        ({"schema_version": 2}, r"schema_version: .*1"),
        ({"ranks": []}, "ranks: "),
    ],
)
def test_nonsense_is_refused_in_one_line(
    plan: Plan, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(plan.model_dump_json()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_plan(tmp_path / "plan.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"split": ')
    with pytest.raises(ValueError, match="Invalid JSON") as caught:
        read_plan(broken)
    assert "\n" not in str(caught.value)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text file"):
        read_plan(broken)


def test_a_plan_is_for_its_own_cluster(plan: Plan) -> None:
    check_cluster(plan, plan.cluster)
    less_free = plan.cluster.nodes[0].gpus[0].model_copy(update={"memory_bytes": 10**9})
    node = plan.cluster.nodes[0]
    busy = plan.cluster.model_copy(
        update={"nodes": (node.model_copy(update={"gpus": (less_free, *node.gpus[1:])}),)}
    )
    check_cluster(plan, busy)  # free memory changes from day to day


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("3xcpu", "2 GPUs against|3 GPUs|2 GPUs"),
        ("2xh100-sxm", "node 0 GPU 0 is h100-sxm with 86 GB instead of cpu"),
        ("2x1xcpu+eth10", "1 machines against 2"),
    ],
)
def test_another_cluster_is_refused_with_the_difference(
    plan: Plan, other: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_cluster(plan, parse_cluster(other))
    assert "plan again for this cluster" in str(caught.value)


def test_other_links_are_a_difference(plan: Plan) -> None:
    node = plan.cluster.nodes[0]
    slow = node.links[0].model_copy(update={"kind": "SYS"})
    other = plan.cluster.model_copy(
        update={"nodes": (node.model_copy(update={"links": (slow, *node.links[1:])}),)}
    )
    with pytest.raises(ValueError, match="GPUs 0 and 1 are joined by SYS instead of SHM"):
        check_cluster(plan, other)
    apart = plan.cluster.model_copy(update={"nodes": (node.model_copy(update={"links": ()}),)})
    with pytest.raises(ValueError, match="the link SHM of GPUs 0 and 1 is missing"):
        check_cluster(plan, apart)
