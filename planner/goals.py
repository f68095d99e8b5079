"""What a plan is made good at: the objectives, and what a replica earns in each."""

from dataclasses import dataclass

import pulp

from rankwright.cost_model.workload import Objective, Workload
from rankwright.planner.candidate import Candidate
from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import device_of


@dataclass(frozen=True, slots=True)
class Goal:
    """An objective: its name with unit, its direction, and how it reads."""

    name: str
    unit: str
    sense: int


GOALS: dict[Objective, Goal] = {
    "throughput": Goal("output tokens per second", "tokens/s", pulp.LpMaximize),
    "latency": Goal("seconds of one request", "s", pulp.LpMinimize),
    "cost": Goal("output tokens per dollar", "tokens/$", pulp.LpMaximize),
    "energy": Goal("output tokens per joule", "tokens/J", pulp.LpMaximize),
}


def ratio_of(candidate: Candidate, placement: int, workload: Workload) -> float:
    """Return tokens per dollar or per joule of a replica on one placement of its pool."""
    per_second = sum(
        candidate.shape.gpus_per_stage * burn_per_s(kind.gpu, workload.objective)
        for kind in candidate.pool.replicas[placement].stages
    )
    requests = candidate.serving[placement].requests_per_s
    if candidate.replicas is not None and workload.request_rate is not None:
        requests = min(requests, workload.request_rate / candidate.replicas)
    return requests * workload.output_tokens / per_second


def burn_per_s(gpu: Gpu, objective: Objective) -> float:
    """Return the dollars or joules that `gpu` takes in a second.

    Energy is the board's rated power: an upper bound that ranks GPUs, not a meter. A device without
    a listed price or power counts one, so that the fewest GPUs win.
    """
    device = device_of(gpu)
    if objective == "energy":
        return device.tdp_w if device is not None else 1.0
    if device is None or device.usd_per_hour is None:
        return 1.0
    return sum(device.usd_per_hour) / len(device.usd_per_hour) / 3600
