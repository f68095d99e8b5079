"""Lets predictions use what a calibration of this machine measured."""

import statistics

from rankwright.cost_model.calibration import Calibration, RunTime
from rankwright.cost_model.fit import fit_shares
from rankwright.cost_model.predict import predict
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Cluster, Gpu, Node
from rankwright.topology.devices import flops_per_s, memory_bytes_per_s


def apply_calibration(cluster: Cluster, calibration: Calibration) -> Cluster:
    """Return `cluster` with the efficiencies that `calibration` gives on the GPUs of its device.

    Kernels give shares of peak. Runs of the whole engine, where it has some, give what a step takes
    besides: the median of what they took longer than predicted.

    Raises:
        ValueError: The cluster has no GPU of the calibration's device.
    """
    shaped = _with_shares(cluster, calibration, {})
    if not calibration.runs:
        return shaped
    bare = _with_shares(cluster, calibration, {"step_s": 0.0})
    left = [one for run in calibration.runs if (one := _left_over_s(bare, run)) is not None]
    if not left:
        return shaped
    return _with_shares(cluster, calibration, {"step_s": max(0.0, statistics.median(left))})


def _left_over_s(cluster: Cluster, run: RunTime) -> float | None:
    """Return what a token of `run` took longer than predicted; None where it cannot run here."""
    load = Workload(
        input_tokens=run.input_tokens,
        output_tokens=run.output_tokens,
        concurrency=run.concurrency,
    )
    try:
        return run.tpot_s - predict(run.model, cluster, load, run.split).tpot_s.value
    except ValueError:  # fewer GPUs than it ran on
        return None


def _with_shares(cluster: Cluster, calibration: Calibration, more: dict[str, float]) -> Cluster:
    nodes: list[Node] = []
    found = False
    for node in cluster.nodes:
        gpus: list[Gpu] = []
        for gpu in node.gpus:
            if gpu.device == calibration.device:
                found = True
                peaks = {dtype: flops_per_s(gpu, dtype) for dtype in ("bfloat16", "float8")}
                shares = fit_shares(calibration, memory_bytes_per_s(gpu), peaks)
                gpus.append(gpu.model_copy(update={"efficiency": shares | more}))
            else:
                gpus.append(gpu)
        nodes.append(node.model_copy(update={"gpus": tuple(gpus)}))
    if not found:
        raise ValueError(
            f"the calibration is of {calibration.device}; {cluster.describe()} has no such GPU"
        )
    return cluster.model_copy(update={"nodes": tuple(nodes)})
