import pytest
from tests.templates.plans import GIB, cluster, cpu_plan, plan

from rankwright.templates.layout import node_shares, start_budget_s
from rankwright.topology.cluster import Cluster


def test_machines_are_numbered_in_the_order_of_the_plan() -> None:
    shares = node_shares(plan((0, 8, 8)))
    assert [(share.node_rank, share.node, share.num_gpus) for share in shares] == [
        (0, 1, 8),
        (1, 2, 8),
    ]


def test_a_gpu_rank_asks_for_two_cpus_and_the_launcher_for_two() -> None:
    assert node_shares(plan())[0].num_cpus == 18


def test_no_more_cpus_are_asked_for_than_a_known_machine_has() -> None:
    small = plan((8, 8), machines=cluster((8, 8), num_cpus=12))
    assert node_shares(small)[0].num_cpus == 12


@pytest.mark.parametrize(
    ("num_ranks", "of_ranks", "num_cpus", "asked"),
    [(2, 2, 4, 4), (2, 4, 8, 4), (6, 6, 2, 2), (1, 4, 2, 1)],
)
def test_cpu_ranks_split_the_cpus_of_their_machine(
    num_ranks: int, of_ranks: int, num_cpus: int, asked: int
) -> None:
    machines = cluster((of_ranks,), "cpu", num_cpus)
    (share,) = node_shares(plan((num_ranks,), tp=1, pp=1, machines=machines))
    assert (share.num_cpus, share.num_gpus, share.num_ranks) == (asked, 0, num_ranks)


def test_cpu_ranks_ask_for_the_memory_that_they_were_predicted_to_hold() -> None:
    (share,) = node_shares(cpu_plan((3,)))
    assert share.memory_bytes == 6 * GIB


def test_gpu_ranks_ask_for_four_gib_of_host_memory_each() -> None:
    assert node_shares(plan())[0].memory_bytes == 32 * GIB


def test_a_start_may_take_as_long_as_slow_storage_takes() -> None:
    # 8 ranks x 72 GiB at 125 MiB/s: 8 * 72 * 1024 / 125 = 4718.6 s, and 300 s.
    assert start_budget_s(node_shares(plan())) == 5019


def test_machines_with_unlike_devices_are_refused() -> None:
    a, b = cluster((8, 8)).nodes
    unlike = b.model_copy(
        update={"gpus": tuple(g.model_copy(update={"device": "a100-sxm-80gb"}) for g in b.gpus)}
    )
    machines = Cluster(nodes=(a, unlike), fabric=cluster((8, 8)).fabric)
    with pytest.raises(ValueError, match="h100-sxm on node 0 and on a100-sxm-80gb on node 1"):
        node_shares(plan(machines=machines))


def test_gpus_that_are_not_the_first_ones_are_refused() -> None:
    whole = plan((2,), tp=2, pp=1, machines=cluster((4,)))
    moved = tuple(rank.model_copy(update={"gpu": rank.gpu + 2}) for rank in whole.ranks)
    with pytest.raises(ValueError, match="uses GPUs 2, 3 of node 0"):
        node_shares(whole.model_copy(update={"ranks": moved}))
