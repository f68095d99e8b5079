"""Reads every machine that we were given: those of a Slurm job, of a torchrun, or of Ray.

Each machine probes itself; what they found is brought together and joined (`join.py`).
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import Literal, get_args

from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.gather_ray import is_ray, over_ray
from rankwright.topology.gather_slurm import probes_of_job
from rankwright.topology.gather_torchrun import bring_together, integer_of, machine_of
from rankwright.topology.join import join
from rankwright.topology.probe import probe
from rankwright.topology.readers.ethernet import read_ethernet
from rankwright.topology.readers.kubernetes import parse_kubernetes
from rankwright.topology.shorthand import parse_fabric

Method = Literal["auto", "slurm", "torchrun", "ray", "kubernetes", "none"]

METHODS: tuple[str, ...] = get_args(Method)

# From the first machine's start to the last one's end: eight GPUs without persistence mode take 20
# to 30 s to wake, Python from a busy network file system as long again.
GATHER_TIMEOUT_S = 180.0
_KUBECTL_TIMEOUT_S = 30.0


def gather(
    method: Method = "auto",
    *,
    require_gpu: bool = False,
    fabric: str | None = None,
    ray_address: str | None = None,
    timeout_s: float = GATHER_TIMEOUT_S,
) -> Cluster | None:
    """Return all machines of the job that we run in as one cluster.

    Args:
        method: 'slurm': from within an allocation, by srun; 'torchrun': every process of it calls
            this, and machine 0 gets the answer; 'ray': a task on each node; 'kubernetes': from
            the labels of its nodes, by kubectl; 'none': this machine alone; 'auto': what the
            environment says.
        require_gpu: Refuse machines without a GPU.
        fabric: The network between them, as shorthand has it; None: what their ports say.
        ray_address: Of a Ray cluster; None: RAY_ADDRESS, else the one on this machine. Naming one
            makes 'auto' mean 'ray'.
        timeout_s: Until all must have answered.

    Returns:
        The cluster; None in a process of torchrun that only helps.

    Raises:
        ProbeError: A machine could not be read or did not answer.
        ValueError: The method does not apply here.
    """
    if method not in METHODS:
        raise ValueError(f"unknown way to gather {method!r}; choose {', '.join(METHODS)}")
    if fabric is not None:
        parse_fabric(fabric)  # before anything is waited for
    chosen = method
    if method == "auto":
        chosen = "ray" if ray_address is not None else find_method(os.environ)
    if ray_address is not None and chosen != "ray":
        raise ValueError(f"--ray-address is for --gather ray, and this is --gather {chosen}")
    if chosen == "slurm":
        found = probes_of_job(os.environ, require_gpu=require_gpu, timeout_s=timeout_s)
        return join(found, fabric=fabric, source="probe over Slurm")
    if chosen == "torchrun":
        machine = machine_of(os.environ)
        if not machine.leads:
            return None
        found, _ = bring_together(machine, lambda: read_here(require_gpu), timeout_s)
        return join(found, fabric=fabric, source="probe over torchrun") if found else None
    if chosen == "ray":
        return over_ray(
            os.environ,
            address=ray_address,
            require_gpu=require_gpu,
            fabric=fabric,
            timeout_s=timeout_s,
        )
    if chosen == "kubernetes":
        return parse_kubernetes(_kubectl(), fabric=fabric)
    return read_here(require_gpu, fabric)


def find_method(environment: Mapping[str, str]) -> Literal["slurm", "torchrun", "ray", "none"]:
    """Return how the machines of this job can be gathered; 'none' where there is but one.

    >>> find_method({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"})
    'torchrun'
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        # Even on one machine, so that its other processes do not print the same again.
        return "torchrun" if integer_of(environment, "WORLD_SIZE", 1) > 1 else "none"
    if is_ray(environment):  # before Slurm, which Ray may run on
        return "ray"
    inside_step = integer_of(environment, "SLURM_STEP_NUM_TASKS", 1) > 1
    several = integer_of(environment, "SLURM_JOB_NUM_NODES", 1) > 1
    if several and not inside_step and shutil.which("srun") is not None:
        return "slurm"
    return "none"


def read_here(require_gpu: bool = False, fabric: str | None = None) -> Cluster:
    """Return this machine with its Ethernet ports, which matter once it has a neighbour."""
    cluster = probe(require_gpu=require_gpu)
    node = cluster.nodes[0]
    known = {nic.name for nic in node.nics}
    more = tuple(nic for nic in read_ethernet() if nic.name not in known)
    node = node.model_copy(update={"nics": (*node.nics, *more)})
    cluster = cluster.model_copy(update={"nodes": (node,)})
    return cluster if fabric is None else join([cluster], fabric=fabric)


def _kubectl() -> str:
    try:
        done = subprocess.run(
            ["kubectl", "get", "nodes", "-o", "json"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_KUBECTL_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise ProbeError(
            "tool_not_found",
            "kubectl is not installed here; save `kubectl get nodes -o json` where it is and give "
            "the file with --from-file",
        ) from None
    except subprocess.TimeoutExpired:
        raise ProbeError(
            "gather_failed",
            f"kubectl did not answer within {_KUBECTL_TIMEOUT_S:g} s; check its context",
        ) from None
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        raise ProbeError("gather_failed", f"kubectl get nodes failed: {reason}; check its context")
    return done.stdout
