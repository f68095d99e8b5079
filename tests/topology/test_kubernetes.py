"""GPU nodes of Kubernetes, from the labels of GPU feature discovery."""

import json
from pathlib import Path
from typing import Any

import pytest

from rankwright.cli import main
from rankwright.topology.cluster import Cluster
from rankwright.topology.readers.kubernetes import is_kubernetes, parse_kubernetes
from rankwright.topology.shorthand import parse_cluster


def item(
    name: str,
    product: str | None = "NVIDIA-H100-80GB-HBM3",
    count: int = 8,
    *,
    ready: str = "True",
    cordoned: bool = False,
    memory_mib: int = 81559,
) -> dict[str, Any]:
    """A node as kubectl prints it, with the labels of an HGX H100."""
    found = {"kubernetes.io/hostname": name}
    if product is not None:
        found |= {
            "nvidia.com/gpu.product": product,
            "nvidia.com/gpu.count": str(count),
            "nvidia.com/gpu.memory": str(memory_mib),
            "nvidia.com/gpu.compute.major": "9",
            "nvidia.com/gpu.compute.minor": "0",
            "nvidia.com/cuda.driver.major": "550",
            "nvidia.com/cuda.driver.minor": "54",
            "nvidia.com/cuda.driver.rev": "15",
        }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": found},
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {
            "allocatable": {"cpu": "191450m", "memory": "2113446Mi", "nvidia.com/gpu": str(count)},
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def text(*items: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)}, indent=4)


def test_labelled_nodes_are_the_cluster_that_shorthand_means() -> None:
    listed = text(item("login", None), item("gpu-0"), item("gpu-1"))
    read = parse_kubernetes(listed, fabric="ib400")
    assert read.fingerprint == parse_cluster("2x8xh100-sxm+ib400").fingerprint
    (node,) = read.nodes
    assert (node.name, node.num_cpus, node.driver) == ("gpu-[0-1]", 191, "550.54.15")
    assert node.host_memory_bytes == 2113446 * 2**20
    assert node.gpus[0].memory_bytes == 81559 * 2**20
    assert node.gpus[0].compute_capability == (9, 0)


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("NVIDIA-A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA-A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA-H100-PCIe", "h100-pcie"),
        ("NVIDIA-H100-NVL", "h100-nvl"),
        ("NVIDIA-H200", "h200-sxm"),
        ("NVIDIA-L40S", "l40s"),
        ("NVIDIA-L4-SHARED", "l4"),
        ("NVIDIA-GeForce-RTX-4090", "rtx4090"),
        ("Tesla-V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "a100-sxm-40gb"),
    ],
)
def test_a_product_label_is_the_drivers_name_with_dashes(label: str, key: str) -> None:
    listed = item("n", label, 2)
    del listed["metadata"]["labels"]["nvidia.com/gpu.memory"]
    read = parse_kubernetes(text(listed))
    assert {gpu.device for gpu in read.nodes[0].gpus} == {key}
    assert read.nodes[0].gpus[0].mig == ("MIG" in label)


def test_nodes_that_take_no_pods_are_left_out_and_named() -> None:
    listed = text(item("a"), item("b", ready="False"), item("c", cordoned=True), item("d", "Foo-1"))
    read = parse_kubernetes(listed)
    assert read.num_nodes == 1
    said = " ".join(read.notes)
    assert "b is left out: it is not ready" in said
    assert "c is left out: it is cordoned" in said
    assert "d is left out: unknown GPU 'Foo 1'" in said


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (text(), "no node has the label"),
        (text(item("a", None)), "no node has the label"),
        (text(item("a"), item("b")), "--fabric ib400"),
        (text(item("a", count=100000)), "a is left out: .*at most 64"),
        (text(item("a", cordoned=True)), "a is left out: it is cordoned"),
        ('{"items": 3}', "items: .*kubectl get nodes"),
        ('{"items": [', "cannot read the list"),
        ('{"items": [{"metadata": 3}, null]}', "items.0.metadata: "),
    ],
)
def test_a_list_without_usable_nodes_is_refused(listed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_kubernetes(listed)


def test_the_command_reads_a_saved_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "nodes.json"
    saved.write_text(text(item("a"), item("b"), item("c", "NVIDIA-L40S", 4, memory_mib=46068)))
    options = ["probe", "--from-file", str(saved), "--fabric", "roce200x4", "--json"]
    assert main(options) == 0
    read = Cluster.model_validate_json(capsys.readouterr().out)
    assert [(node.count, len(node.gpus)) for node in read.nodes] == [(2, 8), (1, 4)]
    assert read.fabric is not None
    assert (read.fabric.kind, read.fabric.ports_per_node) == ("roce", 4)


def test_other_saved_files_are_not_taken_for_one() -> None:
    assert not is_kubernetes("GPU0 GPU1\n")
    assert not is_kubernetes('{"system": {"driver": "6.1"}}')
    assert is_kubernetes(text(item("a")))


def tray(name: str, clique: str) -> dict[str, Any]:
    made = item(name, "NVIDIA-GB200", 4, memory_mib=189471)
    made["metadata"]["labels"]["nvidia.com/gpu.clique"] = clique
    return made


def test_nodes_of_one_clique_are_a_rack() -> None:
    listed = text(tray("a", "u.1"), tray("b", "u.2"), tray("c", "u.1"), tray("d", "u.2"))
    cluster = parse_kubernetes(listed, fabric="ib400")
    assert cluster.racks is not None
    assert (cluster.racks.nodes, cluster.racks.kind) == (2, "NV18")
    assert cluster.nodes[0].name == "a,c,b,d"
    assert [len(island) for island in cluster.islands] == [8, 8]


def test_unequal_cliques_are_noted_and_nodes_without_one_are_no_rack() -> None:
    unequal = text(tray("a", "u.1"), tray("b", "u.2"), tray("c", "u.2"))
    cluster = parse_kubernetes(unequal, fabric="ib400")
    assert cluster.racks is None
    assert any("2 NVLink domains" in note and "(1, 2)" in note for note in cluster.notes)
    # An HGX has a clique of its own, or none.
    alone = parse_kubernetes(text(tray("a", "u.1"), tray("b", "u.2")), fabric="ib400")
    assert alone.racks is None
    assert not any("NVLink domains" in note for note in alone.notes)
