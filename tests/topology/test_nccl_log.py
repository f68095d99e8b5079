"""Which way NCCL went, from logs in the shapes that its versions print."""

import pytest

from rankwright.topology.measurements import Measurements
from rankwright.topology.nccl_note import network_note
from rankwright.topology.readers.nccl_log import NcclLog, join_logs, read_nccl_log, way_of

# Written after the format strings of src/transport (2.4 to 2.28), with made-up hosts.
DIRECT = """\
nodeA:812:954 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.1.0.4<0>
nodeA:812:954 [0] NCCL INFO Using network IB
nodeA:812:954 [0] NCCL INFO NET/IB : GPU Direct RDMA Enabled for HCA 0 'mlx5_0'
nodeA:812:954 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
nodeA:812:954 [0] NCCL INFO Channel 00/0 : 15[7] -> 0[0] [receive] via NET/IB/0/GDRDMA
nodeA:812:954 [0] NCCL INFO Channel 01/0 : 3[3] -> 8[0] [send] via NET/IB/0(1)/GDRDMA
nodeA:812:954 [0] NCCL INFO Channel 02/1 : 0[0] -> 9[1] [send] via NET/IB/1/GDRDMA/Shared
"""
STAGED = """\
nodeA:7:9 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [RO]; OOB eth0:10.1.0.4<0>
nodeA:7:9 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0' (no module)
nodeA:7:9 [1] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 1 'mlx5_1' (no module)
nodeA:7:9 [0] NCCL INFO GPU Direct RDMA Disabled for GPU ca000 / HCA 0 (distance 7 > 4)
nodeA:7:9 [0] NCCL INFO Channel 00 : 0[1a000] -> 1[1a000] [receive] via NET/IB/0
nodeA:7:9 [0] NCCL INFO Channel 01 : 0[1a000] -> 1[1a000] [send] via NET/IB/0
"""
SOCKET = """\
nodeA:5:6 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.
nodeA:5:6 [0] NCCL INFO NET/Socket : Using [0]ens22f0:10.1.15.172<0>
nodeA:5:6 [0] NCCL INFO Using network Socket
nodeA:5:6 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
"""
PLUGIN = """\
[1,4]<stdout>:efa-0:30:70 [4] NCCL INFO NET/OFI Selected Provider is efa (found 4 nics)
[1,4]<stdout>:efa-0:30:70 [4] NCCL INFO Channel 03 : 4[901c0] -> 12[a01d0] [receive] via NET/AWS Libfabric/3/GDRDMA
"""  # noqa: E501
NVLINK = """\
gb-1:3:4 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0'
gb-1:3:4 [0] NCCL INFO Channel 00/0 : 0[0] -> 4[0] via P2P/MNNVL
"""


def read(text: str) -> NcclLog:
    return read_nccl_log(text.splitlines())


def note(text: str, *, has_rdma: bool = True) -> str | None:
    log = read(text)
    measured = Measurements(
        backend="nccl",
        transports=log.transports,
        num_net_channels=log.num_net,
        num_gpudirect_channels=log.num_direct,
        nccl_reasons=log.reasons,
    )
    return network_note(measured, has_rdma=has_rdma)


def test_rdma_into_the_memory_of_gpus() -> None:
    assert read(DIRECT) == NcclLog(("NET/IB/GDRDMA", "P2P/CUMEM"), 3, 3, ())
    assert note(DIRECT) == (
        "between machines NCCL goes over IB with GPUDirect RDMA on all channels"
    )


def test_rdma_by_way_of_host_memory_with_nccls_own_reason() -> None:
    log = read(STAGED)
    assert (log.transports, log.num_net, log.num_direct) == (("NET/IB",), 2, 0)
    # The same reason of two adapters is one.
    assert log.reasons == (
        "NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0' (no module)",
        "GPU Direct RDMA Disabled for GPU ca000 / HCA 0 (distance 7 > 4)",
    )
    said = note(STAGED)
    assert said is not None
    assert "over IB, with GPUDirect RDMA on 0 of 2 channels" in said
    assert "(no module)" in said
    assert "nvidia_peermem" in said


def test_a_fall_back_to_sockets() -> None:
    assert read(SOCKET).transports == ("NET/Socket",)
    said = note(SOCKET)
    assert said is not None
    assert said.startswith("between machines NCCL fell back to sockets")
    assert "NCCL_IB_DISABLE set by environment to 1" in said
    assert note(SOCKET, has_rdma=False) == (
        "between machines NCCL goes over sockets (NET/Socket): there is no RDMA port"
    )


def test_other_networks_and_nvlink_between_machines() -> None:
    assert read(PLUGIN).transports == ("NET/AWS Libfabric/GDRDMA",)
    assert note(PLUGIN) == (
        "between machines NCCL goes over AWS Libfabric with GPUDirect RDMA on all channels"
    )
    # The adapters there are not used at all: what NCCL says of them is no complaint.
    assert note(NVLINK) == "between machines NCCL goes over NVLink (P2P/MNNVL)"
    assert note("") is None
    assert note("h:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via SHM/direct/direct") is None


def test_logs_of_ranks_add_up() -> None:
    log = join_logs([read(DIRECT), read(STAGED), read(STAGED)])
    assert (log.num_net, log.num_direct, len(log.reasons)) == (7, 3, 2)
    assert log.transports == ("NET/IB", "NET/IB/GDRDMA", "P2P/CUMEM")
    said = note(DIRECT + STAGED)
    assert said is not None
    assert "on 3 of 5 channels" in said


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("P2P/IPC", "P2P/IPC"),
        ("P2P/direct pointer", "P2P/direct pointer"),
        ("P2P/indirect/1[1]", "P2P/indirect"),
        ("SHM/direct/direct", "SHM"),
        ("direct shared memory", "SHM"),
        ("NET/IBext_v8/2/GDRDMA(PCI)", "NET/IBext_v8/GDRDMA"),
        ("COLLNET/SHARP/0/GDRDMA", "COLLNET/SHARP/GDRDMA"),
    ],
)
def test_ways_lose_their_numbers(text: str, way: str) -> None:
    assert way_of(text) == way
