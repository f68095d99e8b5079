"""A real Ray of two nodes on this machine, read as one cluster of two."""

import json
import os
import shutil
from typing import Any

import pytest

from rankwright.cli import main
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.gather_ray import RayNode, alive_nodes, choose_nodes, name_nodes, over_ray

ray = pytest.importorskip("ray")

# Ray's own doing: it leaves sockets and processes to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_two_nodes_of_ray_give_one_cluster_of_two(
    ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--ray-address", ray_address, "--fabric", "eth25", "--json"]) == 0
    cluster = Cluster.model_validate_json(capsys.readouterr().out)
    assert cluster.num_nodes == 2
    assert cluster.source == "probe over Ray"
    assert cluster.fabric is not None
    # Both raylets run on this host: their names differ by Ray's node id, and a note says so.
    names = [name for node in cluster.nodes for name in node.name.split(",")]
    assert len(set(names)) == 2
    assert {name.rsplit("-", 1)[0] for name in names} == {os.uname().nodename}
    assert any("2 Ray nodes run on host" in note for note in cluster.notes)
    assert not ray.is_initialized()


def test_the_address_comes_from_the_environment_and_the_cluster_goes_on(
    ray_address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    if shutil.which("nvidia-smi") is None:
        assert main(["probe", "--require-gpu", "--json"]) == 4
        error = json.loads(capsys.readouterr().out)["error"]
        assert os.uname().nodename in error["message"]
    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    try:
        assert sum(row["Alive"] for row in ray.nodes()) == 2
        # A driver that is connected already is used as it is, and stays connected.
        cluster = over_ray({}, address=None, require_gpu=False, fabric="ib400", timeout_s=120)
        assert cluster.num_nodes == 2
        assert ray.is_initialized()
        with pytest.raises(ProbeError, match="no word in time"):
            over_ray({}, address=None, require_gpu=False, fabric=None, timeout_s=0.0)
    finally:
        ray.shutdown()


@pytest.mark.timeout(60)  # Ray alone would try the second for ten minutes
@pytest.mark.parametrize("address", ["there:is:none", "127.0.0.1:1"])
def test_no_cluster_at_the_address_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], address: str
) -> None:
    assert main(["probe", "--gather", "ray", "--ray-address", address]) == 2
    assert f"no Ray cluster answers at {address!r}" in capsys.readouterr().err


def row(node_id: str, address: str, gpus: float, *, alive: bool = True) -> dict[str, Any]:
    return {
        "NodeID": node_id,
        "NodeManagerAddress": address,
        "NodeManagerHostname": f"host-{address}",
        "Alive": alive,
        "Resources": {"GPU": gpus} if gpus else {},
    }


def test_nodes_come_in_the_order_of_their_addresses_without_dead_ones() -> None:
    rows = [
        row("c", "10.0.0.10", 8),
        row("a", "10.0.0.9", 8),
        row("b", "10.0.0.11", 8, alive=False),
    ]
    assert [node.id for node in alive_nodes(rows)] == ["a", "c"]


def test_a_head_without_gpus_is_left_out_and_named() -> None:
    head, worker = RayNode("a", "10.0.0.1", "head", 0), RayNode("b", "10.0.0.2", "worker", 8)
    chosen, notes = choose_nodes([head, worker])
    assert chosen == [worker]
    assert notes == ["Ray nodes without a GPU are left out: 10.0.0.1"]
    assert choose_nodes([head, head]) == ([head, head], [])


def test_equal_host_names_at_different_addresses_are_told_apart() -> None:
    names, notes = name_nodes(
        [RayNode("a1", "10.0.0.1", "n", 8), RayNode("b2", "10.0.0.2", "n", 8)]
    )
    assert names == ["n-a1", "n-b2"]
    assert notes == []
