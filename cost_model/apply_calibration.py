"""Lets predictions use what a calibration of this machine measured."""

from rankwright.cost_model.calibration import Calibration
from rankwright.cost_model.fit import fit_shares
from rankwright.topology.cluster import Cluster, Gpu, Node
from rankwright.topology.devices import flops_per_s, memory_bytes_per_s


def apply_calibration(cluster: Cluster, calibration: Calibration) -> Cluster:
    """Return `cluster` with the efficiencies that `calibration` gives on the GPUs of its device.

    Raises:
        ValueError: The cluster has no GPU of the calibration's device.
    """
    nodes: list[Node] = []
    found = False
    for node in cluster.nodes:
        gpus: list[Gpu] = []
        for gpu in node.gpus:
            if gpu.device == calibration.device:
                found = True
                peaks = {dtype: flops_per_s(gpu, dtype) for dtype in ("bfloat16", "float8")}
                shares = fit_shares(calibration, memory_bytes_per_s(gpu), peaks)
                gpus.append(gpu.model_copy(update={"efficiency": shares}))
            else:
                gpus.append(gpu)
        nodes.append(node.model_copy(update={"gpus": tuple(gpus)}))
    if not found:
        raise ValueError(
            f"the calibration is of {calibration.device}; {cluster.describe()} has no such GPU"
        )
    return cluster.model_copy(update={"nodes": tuple(nodes)})
