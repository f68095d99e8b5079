"""Says in a sentence how NCCL goes between machines."""

from rankwright.topology.measurements import Measurements


def network_note(measured: Measurements, *, has_rdma: bool) -> str | None:
    """Return how NCCL goes between machines, None where no channel leaves its machine.

    Args:
        measured: With what NCCL's log said.
        has_rdma: Whether the machines have RDMA ports.
    """
    ways = [way for way in measured.transports if way.startswith(("NET/", "COLLNET/"))]
    if not ways:
        if "P2P/MNNVL" in measured.transports:
            return "between machines NCCL goes over NVLink (P2P/MNNVL)"
        return None
    reasons = "; ".join(measured.nccl_reasons[:2])
    because = f"; it says: {reasons}" if reasons else ""
    if "NET/Socket" in ways:
        if not has_rdma:
            return "between machines NCCL goes over sockets (NET/Socket): there is no RDMA port"
        return (
            "between machines NCCL fell back to sockets (NET/Socket) although there are RDMA "
            f"ports{because}; check NCCL_IB_DISABLE, NCCL_IB_HCA, NCCL_NET, /dev/infiniband in the "
            "container and `ulimit -l`"
        )
    network = " and ".join(sorted({way.split("/")[1] for way in ways}))
    direct, every = measured.num_gpudirect_channels, measured.num_net_channels
    if direct == every:
        return f"between machines NCCL goes over {network} with GPUDirect RDMA on all channels"
    return (
        f"between machines NCCL goes over {network}, with GPUDirect RDMA on {direct} of {every} "
        f"channels: the rest goes through host memory{because}; load nvidia_peermem or a kernel "
        "with dma-buf, and see NCCL_NET_GDR_LEVEL and whether ACS is off"
    )
