"""NCCL's topology XML against links known by hand."""

import pytest
from tests.topology.captures import NCCL_XML, xml_gpu

from rankwright.topology.captures import describe_topology_text, probe_from_text
from rankwright.topology.devices import DEVICES
from rankwright.topology.errors import ProbeError
from rankwright.topology.pci_ids import PCI_IDS
from rankwright.topology.readers.nccl_xml import cpus_of_mask, parse_nccl_xml

SWITCHED = '<nvlink target="0000:c1:00.0" count="9"/><nvlink target="0000:c2:00.0" count="9"/>'


def system(*inside: str) -> str:
    return f'<system version="1"><cpu numaid="0">{"".join(inside)}</cpu></system>'


def test_pairs_are_named_by_where_their_paths_meet() -> None:
    topology = parse_nccl_xml(NCCL_XML)
    assert topology.matrix == (
        ("X", "PIX", "PXB", "PHB", "SYS"),
        ("PIX", "X", "PXB", "PHB", "SYS"),
        ("PXB", "PXB", "X", "PHB", "SYS"),
        ("PHB", "PHB", "PHB", "X", "SYS"),
        ("SYS", "SYS", "SYS", "SYS", "X"),
    )
    assert [net.name for net in topology.nets] == ["mlx5_0", "eth0"]
    assert topology.nic_matrix == (
        ("PIX", "PIX", "PXB", "PHB", "SYS"),
        ("PHB", "PHB", "PHB", "PHB", "SYS"),
    )
    assert (topology.num_cpus, topology.num_nvlinks, topology.num_gpu_functions) == (2, 0, 5)


def test_ids_name_the_gpus_of_a_cluster() -> None:
    node = probe_from_text(f"NCCL INFO dump\n{NCCL_XML}\nbye\n").nodes[0]
    assert [gpu.device for gpu in node.gpus] == ["h100-sxm"] * 5
    assert [gpu.numa_node for gpu in node.gpus] == [0, 0, 0, 0, 1]
    assert node.gpus[0].pcie_generation == 5
    assert [(nic.name, nic.bytes_per_s, nic.rdma) for nic in node.nics] == [
        ("mlx5_0", 50e9, True),
        ("eth0", 3.125e9, False),
    ]


def test_links_to_switches_join_all_and_direct_ones_a_pair() -> None:
    switched = system(xml_gpu(0, "0000:01:00.0", SWITCHED), xml_gpu(1, "0000:02:00.0", SWITCHED))
    assert parse_nccl_xml(switched).matrix == (("X", "NV18"), ("NV18", "X"))
    direct = system(
        xml_gpu(0, "0000:01:00.0", '<nvlink target="0000:02:00.0" count="4"/>'),
        xml_gpu(1, "0000:02:00.0", '<nvlink target="0000:01:00.0" count="4"/>'),
        xml_gpu(2, "0000:03:00.0"),
    )
    assert parse_nccl_xml(direct).matrix == (
        ("X", "NV4", "PHB"),
        ("NV4", "X", "PHB"),
        ("PHB", "PHB", "X"),
    )
    unequal = switched.replace('count="9"', 'count="4"', 1)
    topology = parse_nccl_xml(unequal)
    assert topology.matrix == (("X", "NV13"), ("NV13", "X"))
    assert topology.notes == (
        "the GPUs have unequal numbers of NVLinks to switches (GPU 0: 13, GPU 1: 18)",
    )


@pytest.mark.parametrize(
    ("links", "says"),
    [
        ('<nvlink target="0000:01:00.0" count="12"/>', "has NVLinks to itself"),
        ('<nvlink target="0000:02:00.0" count="12"/>', "counts 0 back"),
    ],
)
def test_links_that_contradict_make_no_matrix(links: str, says: str) -> None:
    text = system(xml_gpu(0, "0000:01:00.0", links), xml_gpu(1, "0000:02:00.0"))
    page = describe_topology_text(text)
    assert page["matrix"] is None
    assert page["nvlinks"] == 1
    with pytest.raises(ValueError, match=says):
        probe_from_text(text)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("</cpu>\n</system>", "</system>", "line 11: the XML is not well-formed"),
        ('dev="1"', 'dev="0"', "the same dev or busid"),
        ('dev="2"', 'dev="two"', "without number"),
        ('speed="400000"', 'speed=""', "without name or speed"),
        ("<system", "<!-- --><system", ""),
    ],
)
def test_broken_files_are_refused(old: str, new: str, says: str) -> None:
    assert old in NCCL_XML
    text = NCCL_XML.replace(old, new, 1)
    if not says:
        assert parse_nccl_xml(text).num_cpus == 2
        return
    with pytest.raises(ProbeError, match=says):
        parse_nccl_xml(text)


def test_entities_are_refused() -> None:
    bomb = '<system><!DOCTYPE x [<!ENTITY a "aa">]><cpu>&a;</cpu></system>'
    with pytest.raises(ProbeError, match="no entities"):
        parse_nccl_xml(bomb)


def test_a_template_without_gpu_elements_says_so() -> None:
    text = system('<pci busid="0001:00:00.0" class="0x030200"/>')
    with pytest.raises(ValueError, match="1 GPU functions but no <gpu> elements"):
        probe_from_text(text)
    with pytest.raises(ValueError, match="0x10de:0xffff, which"):
        probe_from_text(system(xml_gpu(0, "0000:01:00.0", device="0xffff")))


def test_every_pci_id_is_of_a_known_device() -> None:
    assert set(PCI_IDS.values()) <= set(DEVICES)


def test_masks_are_cpu_lists() -> None:
    assert cpus_of_mask("5") == "0,2"
    assert cpus_of_mask("00000001,00000000") == "32"
    assert (cpus_of_mask(""), cpus_of_mask("0"), cpus_of_mask("zz")) == (None, None, None)
