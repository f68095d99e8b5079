"""Reads every machine that we were given: those of a Slurm job, of a torchrun, or of Ray.

Each machine probes itself; what they found is brought together and joined (`join.py`).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Literal, get_args

from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.gather_ray import is_ray, over_ray
from rankwright.topology.join import join
from rankwright.topology.probe import probe
from rankwright.topology.probe_message import parse_message
from rankwright.topology.readers.ethernet import read_ethernet
from rankwright.topology.readers.kubernetes import parse_kubernetes
from rankwright.topology.rendezvous import collect, send
from rankwright.topology.shorthand import parse_fabric

Method = Literal["auto", "slurm", "torchrun", "ray", "kubernetes", "none"]

METHODS: tuple[str, ...] = get_args(Method)

# From the first machine's start to the last one's end: eight GPUs without persistence mode take 20
# to 30 s to wake, Python from a busy network file system as long again.
GATHER_TIMEOUT_S = 180.0
_KUBECTL_TIMEOUT_S = 30.0

# Prints the name that Slurm has for the machine: its host name may be another. The probe says all
# else on one stream, so that srun can label its lines.
_SLURM_TASK = 'printf "%s\\n" "$SLURMD_NODENAME"; exec "$@"'

# What the job asked for its own tasks; a probe is one task a node and wants all of it.
_JOB_ONLY = {
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
    *("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPUS_PER_TASK", "SLURM_DISTRIBUTION"),
    *("SLURM_CPU_BIND", "SLURM_GPU_BIND", "SLURM_EXACT"),
}


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
        return _over_slurm(os.environ, require_gpu, fabric, timeout_s)
    if chosen == "torchrun":
        return _over_torchrun(os.environ, require_gpu, fabric, timeout_s)
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
    return _here(require_gpu, fabric)


def find_method(environment: Mapping[str, str]) -> Literal["slurm", "torchrun", "ray", "none"]:
    """Return how the machines of this job can be gathered; 'none' where there is but one.

    >>> find_method({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"})
    'torchrun'
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        # Even on one machine, so that its other processes do not print the same again.
        return "torchrun" if _integer(environment, "WORLD_SIZE", 1) > 1 else "none"
    if is_ray(environment):  # before Slurm, which Ray may run on
        return "ray"
    inside_step = _integer(environment, "SLURM_STEP_NUM_TASKS", 1) > 1
    several = _integer(environment, "SLURM_JOB_NUM_NODES", 1) > 1
    if several and not inside_step and shutil.which("srun") is not None:
        return "slurm"
    return "none"


def _here(require_gpu: bool, fabric: str | None = None) -> Cluster:
    """Return this machine with its Ethernet ports, which matter once it has a neighbour."""
    cluster = probe(require_gpu=require_gpu)
    node = cluster.nodes[0]
    known = {nic.name for nic in node.nics}
    more = tuple(nic for nic in read_ethernet() if nic.name not in known)
    node = node.model_copy(update={"nics": (*node.nics, *more)})
    cluster = cluster.model_copy(update={"nodes": (node,)})
    return cluster if fabric is None else join([cluster], fabric=fabric)


def _over_slurm(
    environment: Mapping[str, str], require_gpu: bool, fabric: str | None, timeout_s: float
) -> Cluster:
    if "SLURM_JOB_ID" not in environment:
        raise ValueError(
            "this is no Slurm job: SLURM_JOB_ID is not set; call it from a batch script or within "
            "`salloc --nodes 2 ...`"
        )
    count = _integer(environment, "SLURM_JOB_NUM_NODES", 1)
    command = [
        *("srun", "--label", "--overlap", "--export=ALL", "--input=none"),
        *("--nodes", str(count), "--ntasks", str(count), "--ntasks-per-node=1", "--cpu-bind=none"),
        *("sh", "-c", _SLURM_TASK, "sh", sys.executable, "-m", "rankwright"),
        *("probe", "--json", "--gather", "none"),
        *(["--require-gpu"] if require_gpu else []),
    ]
    ours = {name: value for name, value in environment.items() if name not in _JOB_ONLY}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=ours,
            check=False,
        )
    except FileNotFoundError:
        raise ProbeError(
            "tool_not_found", "srun is not installed here; call it where Slurm's commands are"
        ) from None
    except subprocess.TimeoutExpired:
        raise ProbeError(
            "gather_failed",
            f"srun did not end within {timeout_s:g} s; see `squeue --steps` and whether a node of "
            "the job is down",
        ) from None
    return join(
        read_labelled(done.stdout, count, done.stderr), fabric=fabric, source="probe over Slurm"
    )


def read_labelled(text: str, count: int, said: str = "") -> list[Cluster]:
    """Return what `srun --label` printed: of each of `count` tasks a name, then its probe as JSON.

    Args:
        text: Its standard output.
        count: Tasks.
        said: Its standard error, for the message.

    Raises:
        ProbeError: A task is missing, or could not read its machine.
    """
    lines: dict[int, list[str]] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\d+): ?(.*)", line)
        if match is not None:
            lines.setdefault(int(match[1]), []).append(match[2])
    clusters: list[Cluster] = []
    for task in range(count):
        name, *rest = lines.get(task, [""])
        clusters.append(parse_message("\n".join(rest), name or f"node {task} of {count}", said))
    return clusters


def _over_torchrun(
    environment: Mapping[str, str], require_gpu: bool, fabric: str | None, timeout_s: float
) -> Cluster | None:
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if name not in environment
    ]
    if missing:
        raise ValueError(
            f"this is no process of torchrun: {', '.join(missing)} is not set; call it as "
            "`torchrun --nnodes 2 ... --no-python rankwright probe`"
        )
    if _integer(environment, "LOCAL_RANK", 0) > 0:
        return None
    local = _integer(environment, "LOCAL_WORLD_SIZE", 1)
    number = _integer(environment, "GROUP_RANK", _integer(environment, "RANK", 0) // local)
    count = _integer(
        environment, "GROUP_WORLD_SIZE", _integer(environment, "WORLD_SIZE", 1) // local
    )
    key = _key(environment)
    port = _integer(environment, "MASTER_PORT", 0)
    # The next one: torchrun's store has the port itself.
    port = port + 1 if port < 65535 else port - 1
    problem: ProbeError | None = None
    try:
        cluster = _here(require_gpu)
        message = cluster.model_dump_json()
    except ProbeError as error:
        problem = error
        message = json.dumps({"error": {"class": error.kind, "message": str(error)}})
    try:
        if number > 0:
            send(
                message.encode(),
                number=number,
                host=environment["MASTER_ADDR"],
                port=port,
                key=key,
                timeout_s=timeout_s,
            )
            if problem is not None:
                raise problem
            return None
        messages = collect(message.encode(), count=count, port=port, key=key, timeout_s=timeout_s)
    except OSError as error:  # which TimeoutError is, too
        raise ProbeError(
            "gather_failed",
            f"the machines of this run did not meet on port {port}: {error}; check that it is open "
            "between them, or choose another --master-port",
        ) from None
    found = [
        parse_message(text.decode(errors="replace"), f"machine {index} of {count}")
        for index, text in enumerate(messages)
    ]
    return join(found, fabric=fabric, source="probe over torchrun")


def _key(environment: Mapping[str, str]) -> bytes:
    """Return what only processes of this run know, or, where the run has no id, its address."""
    words = [
        environment.get("RANKWRIGHT_AUTHKEY", ""),
        environment.get("TORCHELASTIC_RUN_ID", ""),
        environment["MASTER_ADDR"],
        environment["MASTER_PORT"],
    ]
    return hashlib.sha256("\n".join(["rankwright probe", *words]).encode()).digest()


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


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else default
